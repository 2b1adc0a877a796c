// @ts-check
/**
 * Connect two copies of a peer-to-peer app through nothing but a link.
 *
 * One user's app makes an invitation, which travels as a link through any messenger; the other's opens it. From then on
 * the two find each other through relays that can read nothing, and connect directly. PROTOCOL.md says what goes over
 * the wire. For browsers (a page over https) and Node >= 20; everything is in this file:
 *
 *     const app = new Connectoid(await Store.open(), ["https://relay.example.com/"], { onEvent: console.log });
 *     await app.start();
 *     const link = await app.share("Bob", location.href);      // or: await app.open(link, "Alice")
 *     const channel = await app.connect("Bob");
 *     await channel.send("hello");
 *     for await (const message of channel) console.log(message);
 *
 * `Contact` is the machine inside, without I/O and clock: events and the time in, effects out, as in connectoid.py.
 * @module
 */

export const VERSION = "0.1.0";

// ---------------------------------------------------------------------------------------
// Limits. What PROTOCOL.md fixes, and what is ours to choose within it. Seconds are those of
// a monotonic clock, except where something outlives the page: then it is microseconds of
// the wall clock.
// ---------------------------------------------------------------------------------------

const MAX_MAILBOXES = 3; // in an address: each costs the other a seal and a request for every message
const MAX_EXT_CHARS = 1_024; // of a mailbox's `ext`, in code points: as relays have it
const MAX_URL_CHARS = 512; // of a relay's URL: a host name has 253
const MAX_ADDRESS_CHARS = 4_096; // of a contact: beside one's own as long there is room for an SDP in every message
const MAX_SEQ = 2 ** 53; // what a number holds exactly
const SECRET_BYTES = 16; // S, R and a hello's nonce: 128 bits
const CHALLENGE_BYTES = 32; // what each sends the other on a new channel
const SIZES = [1_024, 2_048, 4_096, 8_192, 16_384]; // bytes of a plaintext: all that a relay learns of its length
const LENGTH_BYTES = 4;

const POLL_FAST_S = 2; // between two checks while something is going on, where the relay does not wait
const POLL_SLOW_S = 55; // else; PROTOCOL.md allows 66: this leaves time for replies, and for SDP to be gathered
const POLL_FAST_FOR_S = 90; // after something was sent or came
const FRESH_S = 75; // an offer that came since the check before, so long ago at most, is still good
const ZERO_EVERY_S = 3_600; // a check from 0: what a relay that lost its clock would hide comes to light
const AGAIN_AFTER_ANSWER_S = 20; // without a connection
const AGAIN_AFTER_OFFER_S = 50; // the same: the other polls at least every 66 s
const ACTIVE_S = 120; // from the start, or the other's last sign: then attempts are seldom
const AGAIN_IDLE_S = 3_000; // 50 minutes: less than a relay keeps a message
const MAX_UNREACHABLE = 3; // attempts in a row that no channel came of: more only cost the relays something
const NEW_OFFER_S = 5; // a call that comes sooner has crossed the offer
const GATHERED_S = 10; // the app's WebRTC has its own limit of 2 s
const REPEAT_S = 60; // between two welcomes, useds or unshares
const MAX_USED = 10; // replies to others who open a link, for each invitation
const MAX_SEEN = 1_024; // digests of what was read already, so that hourly repeats cost nothing

const DAY_US = 86_400_000_000;
const INVITATION_US = 30 * DAY_US; // how long a link is good, and somebody else who opens it is told
const TOMBSTONE_US = 30 * DAY_US; // how long a former contact is told
const ROTATION_US = 30 * DAY_US; // the age at which an address is replaced
const CROWDED_MESSAGES = 16; // in a mailbox: half of what a relay keeps there of one source
const NEVER_US = Infinity;
const RELEASE_US = 1_795_392_000_000_000; // 2026-11-23: a clock that shows less is wrong

// ---------------------------------------------------------------------------------------
// Errors: the app's mistakes (UsageError), the user's (LinkError), a damaged record, what
// store, relays and connections do, and Refused, which is what others sent. A Refused
// message is counted and forgotten.
// ---------------------------------------------------------------------------------------

/** @type {Readonly<Record<string, string>>} */
export const REASONS = {
  encoding: "not canonical base64url without padding",
  seal: "not sealed to this mailbox with this context string",
  padding: "the plaintext has no allowed size, a wrong length, or something in its padding",
  jws: "not three parts with the one header (a hello has a fourth)",
  payload: "not JSON with the members and forms of its type",
  unexpected: "a type that has no place in this state or from this side",
  recipient: "`to` is not the address that this mailbox belongs to",
  proof: "a hello without the secret of the link",
  commitment: "a signing key and `r` that do not match the link",
  reply: "`re` is not the hash of what was sent",
  sender: "`from` is not the contact's signing key",
  replay: "a `seq` that is not larger than the last one, or the very bytes again",
  signature: "not signed by `from`",
  address: "an address that nobody should write to",
  channel: "the other end of the channel could not show whose it is",
};

/** Is thrown, in one of its subclasses, for everything that can go wrong here. */
export class ConnectoidError extends Error {
  /** @param {string} text */
  constructor(text) {
    super(text);
    this.name = new.target.name;
  }
}

/** The app asked for what makes no sense now, or for what fits in no message. */
export class UsageError extends ConnectoidError {}

/** A link that cannot be used; its text tells the user what to do. */
export class LinkError extends ConnectoidError {}

/** A saved record that is damaged, or of another version. */
export class RecordError extends ConnectoidError {}

/** The store cannot be used; its text says why, and what to do. */
export class StoreError extends ConnectoidError {}

/** There is no connection, or no longer; its text says what is known of the reason. */
export class NotConnectedError extends ConnectoidError {}

/** A relay that cannot be reached, refuses, or answers rubbish; `retryS` is when to ask again, if it said so. */
export class RelayError extends ConnectoidError {
  /** @param {string} text @param {number} [retryS] */
  constructor(text, retryS = 0) {
    super(text);
    this.retryS = retryS;
  }
}

/** What came from outside failed a check: `reason` is a key of REASONS. */
export class Refused extends ConnectoidError {
  /** @param {string} reason @param {string} [detail] */
  constructor(reason, detail = REASONS[reason]) {
    super(detail);
    this.reason = reason;
  }
}

// ---------------------------------------------------------------------------------------
// Encoding and validation: from bytes and text to values that the rest may trust. Pure
// functions that return the value or throw Refused. PROTOCOL.md, "Conventions".
// ---------------------------------------------------------------------------------------

/** @typedef {Uint8Array<ArrayBuffer>} Bytes */

const BASE64URL = /^(?:[\w-]{4})*(?:[\w-][AQgw]|[\w-]{2}[AEIMQUYcgkosw048])?$/; // unused bits are zero
const PUB = /^A[g-z0-9_-][\w-]{63}[AQgw]$/; // 49 bytes that begin with 2 or 3
const URL_FORM = /^(https?):\/\/(\[[\dA-Fa-f:.]+\]|[A-Za-z\d.-]+)(?::(\d{1,5}))?(?:\/[\w.~!$&'()*+,;=:@%/-]*)?$/;
const LOOPBACK = /^(?:localhost|127\.\d{1,3}\.\d{1,3}\.\d{1,3}|\[::1\])$/i;
const MAX_PORT = 65_535;

/** @param {string} text */
const toUtf8 = (text) => new TextEncoder().encode(text);

/** @param {BufferSource} octets */
const fromUtf8 = (octets) => new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(octets);

/** @param {Bytes} octets */
const fromAscii = (octets) => String.fromCharCode(...octets);

/** @param {...Bytes} parts */
function concat(...parts) {
  const whole = new Uint8Array(parts.reduce((count, part) => count + part.length, 0));
  let end = 0;
  for (const part of parts) whole.set(part, (end += part.length) - part.length);
  return whole;
}

/** Compare in constant time. @param {Bytes} one @param {Bytes} other */
function isSame(one, other) {
  let difference = one.length ^ other.length;
  for (let place = 0; place < one.length; place += 1) difference |= one[place] ^ other[place];
  return difference === 0;
}

/** Return RFC 4648 base64url without padding. @param {Bytes} octets */
export function encodeBase64url(octets) {
  let text = "";
  for (const octet of octets) text += String.fromCharCode(octet);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/**
 * Return what base64url stands for; throw Refused (encoding) for padding, another alphabet or unused bits.
 * @param {string} text @returns {Bytes}
 */
export function decodeBase64url(text) {
  if (!BASE64URL.test(text)) throw new Refused("encoding");
  return Uint8Array.from(atob(text.replaceAll("-", "+").replaceAll("_", "/")), (char) => char.charCodeAt(0));
}

/** @param {string} text */
function decodeText(text) {
  const octets = decodeBase64url(text);
  try {
    return fromUtf8(octets);
  } catch {
    throw new Refused("encoding", "not UTF-8");
  }
}

/** @param {string} name @param {unknown} value */
function checkText(name, value) {
  for (const text of [name, value]) if (/\p{Surrogate}/u.test(String(text))) throw new RangeError("a lone surrogate");
  return value;
}

/** @param {BufferSource} octets @returns {any} */
function parseJson(octets) {
  try {
    return JSON.parse(fromUtf8(octets), checkText);
  } catch {
    throw new Refused("payload", "not JSON in UTF-8");
  }
}

/** @param {unknown} value @returns {value is Record<string, any>} */
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

// ---------------------------------------------------------------------------------------
// Mailboxes, addresses, invitations, links. Here `address` is always the very string.
// PROTOCOL.md, "Addresses and links".
// ---------------------------------------------------------------------------------------

/**
 * A public key at a relay, and what the relay wants to see of whoever asks.
 * @typedef {{pub: string, url: string, ext: string | null}} Mailbox
 * @typedef {[url: string, ext: string | null]} Relay
 * @typedef {{allowHttp?: boolean}} Allowed `http` is taken for others than loopback
 *
 * What a link carries: where to write, the secret S that proves the link, and h.
 * @typedef {{text: string, address: string, secret: Bytes, commitment: Bytes}} Invitation
 */

/** Return the address of one to three mailboxes as text. @param {Mailbox[]} mailboxes */
export function formatAddress(mailboxes) {
  return mailboxes.map(({ pub, url, ext }) => [
    pub, encodeBase64url(toUtf8(url)), ...(ext === null ? [] : [encodeBase64url(toUtf8(ext))])].join(".")).join("~");
}

/**
 * Return the mailboxes of an address; throw Refused (address), also for what a client must not ask.
 * Whether the keys are points of the curve is up to Suite.check.
 * @param {string} address @param {Allowed} [allowed] @returns {Mailbox[]}
 */
export function parseAddress(address, { allowHttp = false } = {}) {
  const texts = address.split("~");
  if (texts.length > MAX_MAILBOXES) throw new Refused("address", `it has more than ${MAX_MAILBOXES} mailboxes`);
  const mailboxes = texts.map((text) => parseMailbox(text, allowHttp));
  if (new Set(mailboxes.map(({ pub }) => pub)).size < mailboxes.length) {
    throw new Refused("address", "a key occurs twice in it");
  }
  return mailboxes;
}

/** @param {string} text @param {boolean} allowHttp @returns {Mailbox} */
function parseMailbox(text, allowHttp) {
  const [pub, url, ext, ...more] = text.split(".");
  if (!url || ext === "" || more.length) throw new Refused("address", "it is cut off, or has a part too many");
  if (!PUB.test(pub)) throw new Refused("address", "its key is damaged");
  let mailbox;
  try {
    mailbox = { pub, url: decodeText(url), ext: ext === undefined ? null : decodeText(ext) };
  } catch {
    throw new Refused("address", "a part of it is not readable");
  }
  checkUrl(mailbox.url, allowHttp);
  if (mailbox.ext !== null && [...mailbox.ext].length > MAX_EXT_CHARS) {
    throw new Refused("address", `its ext is longer than ${MAX_EXT_CHARS} characters`);
  }
  return mailbox;
}

/** Only https; no user, query or fragment. @param {string} url @param {boolean} allowHttp */
function checkUrl(url, allowHttp) {
  const match = url.length <= MAX_URL_CHARS ? URL_FORM.exec(url) : null;
  const port = Number(match?.[3] ?? 1);
  if (!match || port < 1 || port > MAX_PORT) {
    throw new Refused("address", "its relay has no URL like https://relay.example.com/");
  }
  if (match[1] === "http" && !allowHttp && !LOOPBACK.test(match[2])) {
    throw new Refused("address", "http is for a relay on this machine, elsewhere it is https");
  }
}

/**
 * Return what an invitation holds; throw LinkError with a sentence for the user.
 * @param {string} text @param {Allowed} [allowed] @returns {Invitation}
 */
export function parseInvitation(text, allowed = {}) {
  const first = text.split("~");
  const [pub, url = "", ext = "", ...rest] = /** @type {string} */ (first.pop()).split(".");
  const address = [...first, [pub, url, ...(ext ? [ext] : [])].join(".")].join("~");
  try {
    parseAddress(address, allowed);
  } catch (error) {
    throw new LinkError(`This link is damaged: ${/** @type {Error} */ (error).message}. `
      + "Copy it again, whole, or ask for a new one.");
  }
  const fourth = rest.join(".");
  if (!fourth) throw new LinkError("This link has no secret; ask for a new one.");
  if (!/^[\w-]{64}$/.test(fourth)) throw new LinkError("This link is cut off or damaged. Copy it again, whole.");
  const both = decodeBase64url(fourth); // 48 bytes: 64 characters have no unused bits
  return { text, address, secret: both.slice(0, SECRET_BYTES), commitment: both.slice(SECRET_BYTES) };
}

/**
 * Return the link to an app: the invitation is in the fragment, which no server gets to see.
 * @param {string} appUrl @param {string} invitation
 */
export function makeLink(appUrl, invitation) {
  return `${appUrl.split("#")[0]}#connectoid=${invitation}`;
}

/**
 * Return the invitation in a link, in its fragment or its query, or bare; throw LinkError.
 * @param {string} link @param {Allowed} [allowed]
 */
export function readLink(link, allowed = {}) {
  const [, address, query = "", fragment = ""] = /** @type {RegExpExecArray} */ (
    /^([^?#]*)(?:\?([^#]*))?(?:#(.*))?$/s.exec(link.trim()));
  for (const parameter of `${fragment}&${query}`.split("&")) {
    if (parameter.startsWith("connectoid=")) return parseInvitation(unquote(parameter.slice(11)), allowed);
  }
  if (query || fragment || !/^[\w.~-]+$/.test(address) || !PUB.test(address.split(".")[0])) {
    throw new LinkError("There is no invitation in this link: connectoid=... is missing. Copy it again, whole.");
  }
  return parseInvitation(address, allowed);
}

/** @param {string} text */
function unquote(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text; // its percent signs are refused
  }
}

// ---------------------------------------------------------------------------------------
// Cryptography. All context strings, the suite that the state machine is handed, and the
// one for real. A private key is a value that only its suite understands.
// ---------------------------------------------------------------------------------------

export const CONTEXTS = {
  question: toUtf8("connectoid/1 question"),
  message: toUtf8("connectoid/1 message"),
  channel: toUtf8("connectoid/1 channel"),
  emoji: toUtf8("connectoid/1 emoji"),
};

/**
 * A private key, as its suite made it.
 * @typedef {any} Key
 * @typedef {"ECDH" | "ECDSA"} Use
 *
 * What the state machine needs of cryptography; PROTOCOL.md, "Keys". `makeKey` returns a key for one use, with its
 * public key in the form of `pub`; `seal` enc || ciphertext; `sign` r || s of ES384. `check` and `seal` throw Refused
 * (address) for no point of the curve, `open` Refused (seal), `verify` Refused (signature).
 * @typedef {object} Suite
 * @property {(count: number) => Bytes} random
 * @property {(use: Use) => Promise<[Key, string]>} makeKey
 * @property {(pub: string) => Promise<void>} check
 * @property {(pub: string, context: Bytes, plaintext: Bytes) => Promise<Bytes>} seal
 * @property {(key: Key, context: Bytes, sealed: Bytes) => Promise<Bytes>} open
 * @property {(key: Key, octets: Bytes) => Promise<Bytes>} sign
 * @property {(pub: string, signature: Bytes, octets: Bytes) => Promise<void>} verify
 */

/**
 * Return the mailboxes of an address to write to; throw Refused (address) if not all can be written to.
 * @param {Suite} suite @param {string} address @param {Allowed} [allowed]
 */
async function checkAddress(suite, address, allowed) {
  if (address.length > MAX_ADDRESS_CHARS) {
    throw new Refused("address", `it has more than ${MAX_ADDRESS_CHARS} characters`);
  }
  const mailboxes = parseAddress(address, allowed);
  for (const { pub } of mailboxes) await suite.check(pub);
  return mailboxes;
}

const POINT_BYTES = 97; // uncompressed
const SIGNATURE_BYTES = 96;
const HASH_BYTES = 48; // of SHA-384, the K of HPKE
const P = 2n ** 384n - 2n ** 128n - 2n ** 96n + 2n ** 32n - 1n;
const B = 0xb3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875ac656398d8a2ed19d2a85c8edd3ec2aefn;
const KEM = concat(toUtf8("KEM"), Uint8Array.of(0, 0x11)); // DHKEM(P-384, HKDF-SHA384)
const HPKE = concat(toUtf8("HPKE"), Uint8Array.of(0, 0x11, 0, 2, 0, 2)); // with HKDF-SHA384, AES-256-GCM
const NOTHING = new Uint8Array();
const ES384 = { name: "ECDSA", hash: "SHA-384" };

/** @param {Use} name */
const curve = (name) => ({ name, namedCurve: "P-384" });

/** @param {Bytes} raw uncompressed */
const compress = (raw) => concat(Uint8Array.of(2 + (raw[POINT_BYTES - 1] & 1)), raw.slice(1, HASH_BYTES + 1));

/** Return the uncompressed point, for engines that take no other; throw if there is none. @param {Bytes} point */
export function decompress(point) {
  const x = BigInt(`0x${Array.from(point.slice(1), (octet) => octet.toString(16).padStart(2, "0")).join("")}`);
  const square = (x ** 3n - 3n * x + B) % P;
  let root = 1n;
  for (const bit of ((P + 1n) / 4n).toString(2)) root = root * root * (bit === "1" ? square : 1n) % P; // P = 3 mod 4
  if (x >= P || (root * root - square) % P) throw new RangeError("no point of the curve");
  const y = Number(root & 1n) === point[0] - 2 ? root : P - root;
  const octets = y.toString(16).padStart(2 * HASH_BYTES, "0").match(/../g) ?? [];
  return concat(Uint8Array.of(4), point.slice(1), Uint8Array.from(octets, (hex) => parseInt(hex, 16)));
}

/**
 * P-384 with HPKE (RFC 9180) and ES384 (RFC 7518, section 3.4), by Web Crypto. A key is a CryptoKeyPair that cannot be
 * taken out of the browser; IndexedDB keeps it as it is.
 * @implements {Suite}
 */
export class SystemSuite {
  /** @param {Crypto} [crypto] */
  constructor(crypto = globalThis.crypto) {
    if (!crypto?.subtle) throw new ConnectoidError("This page cannot encrypt: open it over https, in a newer browser.");
    this._crypto = crypto;
    this._subtle = crypto.subtle;
  }

  /** @type {Suite["random"]} */
  random(count) {
    return this._crypto.getRandomValues(new Uint8Array(count));
  }

  /** @type {Suite["makeKey"]} */
  async makeKey(use) {
    const usages = /** @type {KeyUsage[]} */ (use === "ECDH" ? ["deriveBits"] : ["sign", "verify"]);
    const pair = /** @type {CryptoKeyPair} */ (await this._subtle.generateKey(curve(use), false, usages));
    return [pair, encodeBase64url(compress(await this._export(pair.publicKey)))];
  }

  /** @type {Suite["check"]} */
  async check(pub) {
    await this._import(pub, "ECDH");
  }

  /** @type {Suite["seal"]} */
  async seal(pub, context, plaintext) {
    const [theirs, [ours]] = await Promise.all([this._import(pub, "ECDH"), this.makeKey("ECDH")]);
    const enc = await this._export(ours.publicKey);
    const cipher = await this._schedule(ours, theirs, concat(enc, await this._export(theirs)), context);
    return concat(enc, new Uint8Array(await this._subtle.encrypt(...cipher, plaintext)));
  }

  /** @type {Suite["open"]} */
  async open(ours, context, sealed) {
    try {
      const enc = sealed.slice(0, POINT_BYTES);
      if (enc[0] !== 4) throw new RangeError("another form of points");
      const theirs = await this._subtle.importKey("raw", enc, curve("ECDH"), true, []);
      const cipher = await this._schedule(ours, theirs, concat(enc, await this._export(ours.publicKey)), context);
      return new Uint8Array(await this._subtle.decrypt(...cipher, sealed.slice(POINT_BYTES)));
    } catch {
      throw new Refused("seal");
    }
  }

  /** @type {Suite["sign"]} */
  async sign({ privateKey }, octets) {
    return new Uint8Array(await this._subtle.sign(ES384, privateKey, octets));
  }

  /** @type {Suite["verify"]} */
  async verify(pub, signature, octets) {
    const key = await this._import(pub, "ECDSA").catch(() => null);
    const signed = key && signature.length === SIGNATURE_BYTES
      && await this._subtle.verify(ES384, key, signature, octets).catch(() => false);
    if (!signed) throw new Refused("signature");
  }

  /** @param {CryptoKey} key */
  async _export(key) {
    return new Uint8Array(await this._subtle.exportKey("raw", key));
  }

  /** @param {string} pub @param {Use} use */
  async _import(pub, use) {
    /** @param {Bytes} point */
    const read = (point) => this._subtle.importKey("raw", point, curve(use), true, use === "ECDH" ? [] : ["verify"]);
    try {
      const point = decodeBase64url(pub);
      if (!PUB.test(pub)) throw new RangeError("not compressed");
      return await read(point).catch(() => read(decompress(point)));
    } catch {
      throw new Refused("address", "its key is no point of the curve");
    }
  }

  /**
   * Return key and nonce of RFC 9180, sections 4.1 and 5.1, mode base; one message for each, so the nonce is the first.
   * `points` are enc and the recipient's.
   * @param {CryptoKeyPair} ours @param {CryptoKey} theirs @param {Bytes} points @param {Bytes} context
   * @returns {Promise<[AesGcmParams, CryptoKey]>}
   */
  async _schedule({ privateKey }, theirs, points, context) {
    const dh = await this._subtle.deriveBits({ name: "ECDH", public: theirs }, privateKey, 8 * HASH_BYTES);
    const prk = await extract(NOTHING, KEM, "eae_prk", new Uint8Array(dh));
    const shared = await expand(prk, KEM, "shared_secret", points, HASH_BYTES);
    const all = concat(Uint8Array.of(0), await extract(NOTHING, HPKE, "psk_id_hash", NOTHING),
      await extract(NOTHING, HPKE, "info_hash", context));
    const secret = await extract(shared, HPKE, "secret", NOTHING);
    const raw = await expand(secret, HPKE, "key", all, 32);
    const key = await this._subtle.importKey("raw", raw, "AES-GCM", false, ["encrypt", "decrypt"]);
    return [{ name: "AES-GCM", iv: await expand(secret, HPKE, "base_nonce", all, 12) }, key];
  }
}

/** @param {Bytes} salt @param {Bytes} suiteId @param {string} label @param {Bytes} ikm */
function extract(salt, suiteId, label, ikm) {
  return hmac("SHA-384", salt, toUtf8("HPKE-v1"), suiteId, toUtf8(label), ikm);
}

/** @param {Bytes} prk @param {Bytes} suiteId @param {string} label @param {Bytes} context @param {number} count */
async function expand(prk, suiteId, label, context, count) {
  const parts = [Uint8Array.of(0, count), toUtf8("HPKE-v1"), suiteId, toUtf8(label), context, Uint8Array.of(1)];
  return (await hmac("SHA-384", prk, ...parts)).slice(0, count);
}

/** @param {"SHA-256" | "SHA-384"} hash @param {Bytes} key @param {...Bytes} parts */
async function hmac(hash, key, ...parts) {
  const padded = key.length ? key : new Uint8Array(1); // the same by RFC 2104; Web Crypto takes no empty key
  const made = await crypto.subtle.importKey("raw", padded, { name: "HMAC", hash }, false, ["sign"]);
  return new Uint8Array(await crypto.subtle.sign("HMAC", made, concat(...parts)));
}

/** @param {...Bytes} parts */
async function sha256(...parts) {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", concat(...parts)));
}

/**
 * Return h, which a link holds: it pins the inviter's signing key and commits her to R.
 * @param {string} signer @param {string} r
 */
export async function hashCommitment(signer, r) {
  return sha256(decodeBase64url(signer), decodeBase64url(r));
}

/**
 * Return a hello's fourth part, which proves that its sender has the link.
 * @param {Bytes} secret @param {string} jws
 */
export async function prove(secret, jws) {
  return encodeBase64url(await hmac("SHA-256", secret, toUtf8(jws)));
}

/** Return what stays of an invitation: enough to know a link that was opened before. @param {string} invitation */
async function hashLink(invitation) {
  return encodeBase64url(await sha256(toUtf8(invitation)));
}

/** @param {string} jws */
const threeParts = (jws) => jws.split(".").slice(0, 3).join(".");

/**
 * Return the hash of a message in base64url: of its JWS in three parts, a hello's proof left out.
 * @param {string} jws
 */
export async function hashJws(jws) {
  return encodeBase64url(await sha256(toUtf8(threeParts(jws))));
}

// ---------------------------------------------------------------------------------------
// Messages: the envelope, from the inside out, and the members of each type.
// PROTOCOL.md, "Messages between apps".
// ---------------------------------------------------------------------------------------

const HEADER = encodeBase64url(toUtf8('{"alg":"ES384","typ":"connectoid"}'));
const HASH = /^[\w-]{42}[AEIMQUYcgkosw048]$/; // 32 bytes
const RANDOM = /^[\w-]{21}[AQgw]$/; // 16 bytes

/** @typedef {(value: any) => boolean} Fits */

/** @param {RegExp} pattern @returns {Fits} */
const matches = (pattern) => (value) => typeof value === "string" && pattern.test(value);

/** @param {string} kind @returns {Fits} */
const isSdp = (kind) => (value) => isObject(value) && value.type === kind && typeof value.sdp === "string";

/** @param {Fits} fits @returns {Fits} */
const orNull = (fits) => (value) => value === null || fits(value);

/** @param {Fits} fits @returns {Fits} */
const orNone = (fits) => (value) => value === undefined || value === null || fits(value);

/** @type {Fits} */
const isText = (value) => typeof value === "string";
const anyRe = orNull(matches(HASH));
/** @type {Record<string, Fits>} */
const ALWAYS = {
  to: isText,
  from: matches(PUB),
  seq: (value) => Number.isSafeInteger(value) && value > 0,
  connectoid: isText,
};
/** The form of the members of each type. What is not here is ignored. @type {Record<string, Record<string, Fits>>} */
const MEMBERS = {
  hello: { re: (value) => value === null, nonce: matches(RANDOM), sdpOffer: isSdp("offer") },
  welcome: { re: matches(HASH), r: matches(RANDOM), sdpAnswer: orNone(isSdp("answer")) },
  used: { re: matches(HASH), r: matches(RANDOM) },
  ready: { re: matches(HASH), sdpOffer: orNone(isSdp("offer")) },
  offer: { re: anyRe, sdpOffer: isSdp("offer") },
  answer: { re: matches(HASH), sdpAnswer: isSdp("answer") },
  call: { re: anyRe },
  unshare: { re: anyRe },
};
const UNNUMBERED = ["hello", "welcome", "used"]; // known by their hash; all others by seq

/**
 * An offer or answer of WebRTC.
 * @typedef {{type: "offer" | "answer", sdp: string}} Sdp
 *
 * A message whose form is right; who sent it is only claimed until checkSignature. `hash` is what an `re` to it says.
 * @typedef {{jws: string, proof: string | null, payload: Record<string, any>, type: string, hash: string,
 *   sdp: Sdp | null}} Message
 */

/**
 * Return a compact JWS (RFC 7515) over a payload as JSON.
 * @param {Suite} suite @param {Key} key @param {Record<string, unknown>} payload
 */
export async function signJws(suite, key, payload) {
  const signed = `${HEADER}.${encodeBase64url(toUtf8(JSON.stringify(payload)))}`;
  return `${signed}.${encodeBase64url(await suite.sign(key, toUtf8(signed)))}`;
}

/**
 * Return the message in a JWS; throw Refused (jws, encoding, payload). The signature is not yet checked.
 * @param {string} text @returns {Promise<Message>}
 */
export async function readJws(text) {
  const [header, body, signature, proof = null, ...more] = text.split(".");
  if (header !== HEADER || signature === undefined || more.length) throw new Refused("jws");
  const payload = parseJson(decodeBase64url(body));
  decodeBase64url(signature);
  if (!isObject(payload) || typeof payload.type !== "string" || !Object.hasOwn(MEMBERS, payload.type)) {
    throw new Refused("payload", "no known type");
  }
  const { type } = payload;
  for (const [name, fits] of Object.entries({ ...ALWAYS, ...MEMBERS[type] })) {
    if (!fits(payload[name])) throw new Refused("payload", `${type} with a wrong ${name}`);
  }
  if ((proof !== null) !== (type === "hello")) {
    throw new Refused("jws", "a proof is the fourth part of a hello, and of nothing else");
  }
  const jws = `${header}.${body}.${signature}`;
  return { jws, proof, payload, type, hash: await hashJws(jws), sdp: sdpOf(payload, type) };
}

/**
 * Return the offer or answer in a message, without members that WebRTC does not know.
 * @param {Record<string, any>} payload @param {string} type
 */
function sdpOf(payload, type) {
  const name = ["sdpOffer", "sdpAnswer"].find((member) => MEMBERS[type][member]);
  const sdp = name && payload[name];
  return sdp ? { type: sdp.type, sdp: sdp.sdp } : null;
}

/** Throw Refused (signature) unless `from` signed it. @param {Suite} suite @param {Message} message */
export async function checkSignature(suite, { jws, payload }) {
  const end = jws.lastIndexOf(".");
  await suite.verify(payload.from, decodeBase64url(jws.slice(end + 1)), toUtf8(jws.slice(0, end)));
}

/**
 * Return `data` for a mailbox; throw UsageError if the text fits in no message.
 * @param {Suite} suite @param {string} pub @param {string} text
 */
export async function sealMessage(suite, pub, text) {
  const octets = toUtf8(text);
  const needed = LENGTH_BYTES + octets.length;
  const size = SIZES.find((size) => size >= needed);
  if (!size) {
    throw new UsageError(
      `A message of ${needed} bytes is over ${SIZES[SIZES.length - 1]}: use fewer relays or a shorter SDP.`);
  }
  const plaintext = new Uint8Array(size);
  new DataView(plaintext.buffer).setUint32(0, octets.length);
  plaintext.set(octets, LENGTH_BYTES);
  return encodeBase64url(await suite.seal(pub, CONTEXTS.message, plaintext));
}

/**
 * Return the text in `data`; throw Refused (encoding, seal, padding, jws).
 * @param {Suite} suite @param {Key} key @param {string} sealed
 */
export async function openMessage(suite, key, sealed) {
  const plaintext = await suite.open(key, CONTEXTS.message, decodeBase64url(sealed));
  if (!SIZES.includes(plaintext.length)) throw new Refused("padding");
  const end = LENGTH_BYTES + new DataView(plaintext.buffer).getUint32(0);
  if (end > plaintext.length || plaintext.slice(end).some(Boolean)) throw new Refused("padding");
  const octets = plaintext.slice(LENGTH_BYTES, end);
  if (octets.some((octet) => octet > 0x7f)) throw new Refused("jws", "not ASCII");
  return fromAscii(octets);
}

// ---------------------------------------------------------------------------------------
// The comparison string: what two people read to each other to be sure that nobody stands
// between them. PROTOCOL.md, "Comparison string".
// ---------------------------------------------------------------------------------------

/** Those of the Matrix specification, "SAS method: emoji", in its order, with their names. */
export const EMOJI = (
  "🐶 Dog|🐱 Cat|🦁 Lion|🐎 Horse|🦄 Unicorn|🐷 Pig|🐘 Elephant|🐰 Rabbit|🐼 Panda|🐓 Rooster|"
  + "🐧 Penguin|🐢 Turtle|🐟 Fish|🐙 Octopus|🦋 Butterfly|🌷 Flower|🌳 Tree|🌵 Cactus|🍄 Mushroom|"
  + "🌏 Globe|🌙 Moon|☁️ Cloud|🔥 Fire|🍌 Banana|🍎 Apple|🍓 Strawberry|🌽 Corn|🍕 Pizza|🎂 Cake|"
  + "❤️ Heart|😀 Smiley|🤖 Robot|🎩 Hat|👓 Glasses|🔧 Spanner|🎅 Santa|👍 Thumbs Up|☂️ Umbrella|"
  + "⌛ Hourglass|⏰ Clock|🎁 Gift|💡 Light Bulb|📕 Book|✏️ Pencil|📎 Paperclip|✂️ Scissors|🔒 Lock|"
  + "🔑 Key|🔨 Hammer|☎️ Telephone|🏁 Flag|🚂 Train|🚲 Bicycle|✈️ Aeroplane|🚀 Rocket|🏆 Trophy|"
  + "⚽ Ball|🎸 Guitar|🎺 Trumpet|🔔 Bell|⚓ Anchor|🎧 Headphones|📁 Folder|📌 Pin"
).split("|").map((both) => [both.slice(0, both.indexOf(" ")), both.slice(both.indexOf(" ") + 1)]);
const COMPARED = 7; // of 6 bits each

/**
 * Return seven indexes of EMOJI for the texts as sent; a hello in three or four parts.
 * @param {string} invitation @param {string} hello @param {string} inviter @param {string} r
 */
export async function comparisonString(invitation, hello, inviter, r) {
  const texts = [invitation, threeParts(hello), inviter, r];
  const digest = await sha256(CONTEXTS.emoji, ...texts.map((text) => toUtf8(`\0${text}`)));
  const bits = Array.from(digest, (octet) => octet.toString(2).padStart(8, "0")).join("");
  return Array.from({ length: COMPARED }, (_, place) => parseInt(bits.slice(6 * place, 6 * place + 6), 2));
}

// ---------------------------------------------------------------------------------------
// What is kept of a contact, and what a step of its machine asks for.
// ---------------------------------------------------------------------------------------

/**
 * The time, twice: of the wall, in microseconds since 1970; and one that never goes back, in seconds.
 * @typedef {{wallUs: number, monotonicS: number}} Now
 *
 * An address of one's own, with the private keys of its mailboxes in order.
 * @typedef {{address: string, keys: Key[]}} Own
 *
 * Everything of a contact that survives the page: an object for the structured clone of IndexedDB.
 * @typedef {typeof BLANK} Kept
 */

const RECORD_VERSION = 1;
const BLANK = {
  version: RECORD_VERSION,
  role: /** @type {"inviter" | "opener"} */ ("inviter"), // the inviter made the link
  state: "", // of PAIRING
  name: "",
  relays: /** @type {Relay[]} */ ([]), // for new addresses of one's own
  privateKey: /** @type {Key} */ (null), // signs; for the life of the contact
  signer: "", // its public key
  expiresUs: 0, // of the invitation, or of the tombstone
  invitation: "",
  linkHash: "", // of the invitation, which goes sooner
  hello: "", // the opener's, with its proof
  helloHash: "", // of the one that counts
  welcome: "", // the inviter's
  welcomeHash: "",
  r: "", // the inviter's
  invited: /** @type {Own | null} */ (null), // the address in the link
  current: /** @type {Own | null} */ (null),
  pending: /** @type {Own | null} */ (null), // announced, and nothing came there yet
  former: /** @type {Own | null} */ (null),
  rotatedUs: 0,
  contact: "", // the other's signing key
  contactAddress: "",
  comparison: /** @type {number[]} */ ([]),
  verified: false, // the user has compared: true for this pair of signing keys
  seq: 0, // the last that was sent
  seenSeq: 0, // the last that was accepted
  usedTo: /** @type {string[]} */ ([]), // the hashes of other hellos that were answered, one for each reply
  why: "", // it ended: a key of EVENTS
};

/** Return a record as it was kept; throw RecordError. @param {any} record @returns {Kept} */
export function checkKept(record) {
  if (isObject(record) && record.version > RECORD_VERSION) {
    throw new RecordError("A saved contact is of another version of Connectoid.");
  }
  try {
    const fits = Object.entries(BLANK).every(([name, blank]) => blank === null || typeof blank === typeof record[name]);
    const known = record.state === "ended" || [...PAIRING.values()].some(({ state }) => state === record.state);
    const owns = ["invited", "current", "pending", "former"].map((name) => record[name]).filter((own) => own !== null);
    if (fits && known && record.role in NUMBERED_FOR && owns.every((own) => pairs(own).length === own.keys.length)) {
      return /** @type {Kept} */ (record);
    }
  } catch {} // as below
  throw new RecordError("A saved contact is damaged.");
}

/**
 * `save`: write the record down, durably, before anything that follows; if that fails, drop the Contact. `forget`:
 * delete it. `send` data to a mailbox. `gather`: make a peer connection in place of the former one, and an offer (or
 * the answer to this offer): `gathered`. `join`: give the answer to it. `write` one binary message on its channel.
 * `close` it, if there is one. `tell` the app a key of EVENTS.
 * @typedef {{do: "save", kept: Kept} | {do: "forget"} | {do: "send", mailbox: Mailbox, data: string}
 *   | {do: "gather", ask: number, offer: Sdp | null} | {do: "join", ask: number, answer: Sdp}
 *   | {do: "write", ask: number, octets: Bytes} | {do: "close", ask: number} | {do: "tell", event: string}} Effect
 */

/** @type {Readonly<Record<string, string>>} */
export const EVENTS = {
  paired: "The two know each other now; the comparison string is there.",
  connected: "The channel is open, and the other end has shown whose it is.",
  disconnected: "The channel is closed.",
  opened_twice: "Somebody else opened this link too. Compare the emoji by voice before you trust this contact.",
  used: "This link was used by somebody else, or withdrawn; ask for a new one.",
  expired: "Nobody answered for as long as the link was good; share again.",
  unshared: "The other has ended the sharing.",
  unanswered: "Not answered yet; tried again from time to time.",
  unreachable: "Both answered, but their networks do not connect: they may need a TURN server.",
};

/**
 * A mailbox to check: `at` goes into the check, the key opens its question and its messages.
 * @typedef {{mailbox: Mailbox, key: Key, at: number}} Poll
 */

// ---------------------------------------------------------------------------------------
// The states. A rule says which method does what an event asks for in a state, and where
// that may lead. What has no rule is no event of that state: a message is refused, what
// WebRTC says too late is ignored. PROTOCOL.md, "States", is drawn from here.
// ---------------------------------------------------------------------------------------

/**
 * In a state, an event: the method `_does`, and the states that may follow.
 * @typedef {{state: string, event: string, does: string, then: string[]}} Rule
 */

/**
 * Return the rules by "state event"; `=` among what may follow is the state itself.
 * @param {string[]} rules states | event | does | then @returns {ReadonlyMap<string, Rule>}
 */
function table(...rules) {
  return new Map(rules.map((rule) => rule.split(" | ")).flatMap(([states, event, does, all]) => (
    states.split(" ").map((state) => {
      const then = [...new Set(all.replace("=", state).split(" "))];
      return [`${state} ${event}`, { state, event, does, then }];
    }))));
}

/** What is known of the other. `message` is any numbered message of the contact but `unshare`. */
export const PAIRING = table(
  "invited | hello | bind | welcomed",
  "welcomed paired | hello | greet | =",
  "welcomed | message | confirm | paired",
  "opened | welcome | accept | ready",
  "opened | used | endUsed | ended",
  "ready | message | confirm | paired",
  "welcomed ready | proven | confirm | paired",
  "paired | message | goOn | paired",
  "invited welcomed opened ready paired | leave | withdraw | unshared",
  "welcomed ready paired | unshare | endUnshared | ended",
  "invited opened | expire | endExpired | ended",
  "welcomed ready | expire | partExpired | unshared", // the other may know it as paired: tell
  "unshared | hello | refuse | unshared",
  "unshared | welcome | partLate | unshared",
  "unshared | message | part | unshared",
  "unshared | unshare | vanish | ended",
  "unshared | expire | vanish | ended",
);
/** What is going on to connect: nothing of it outlives the page. */
export const CONNECTING = table(
  "apart | begin | begin | gathering waiting apart",
  "apart gathering waiting joining proving connected | offer | takeOffer | gathering",
  "apart gathering waiting joining proving connected | stale | call | waiting",
  "apart joining proving | call | offer | gathering",
  "waiting connected | call | offerUnlessCrossed | gathering =",
  "apart waiting | welcome | offer | gathering",
  "gathering | gathered | sendSdp | waiting joining apart",
  "gathering | late | sendSdp | waiting apart",
  "waiting joining proving | late | again | gathering waiting = apart",
  "waiting | answer | join | joining",
  "joining | channel | challenge | proving",
  "proving | octets | prove | proving connected waiting",
  "proving | closed | awaitAgain | waiting",
  "connected | closed | lose | apart",
  "apart gathering waiting joining proving connected | stop | stop | apart",
);
const KNOWN = { allowHttp: true }; // what is kept was checked when it came
const LASTING = ["opened", "ready"]; // the opener in these states wants to connect, whether the app does or not
const NUMBERED_FOR = { inviter: ["ready", "offer", "unshare"], opener: ["answer", "call", "unshare"] };
const RESTLESS = ["gathering", "waiting", "joining", "proving"];

/**
 * One attempt to connect, for one peer connection: `lateS` is when the state has lasted too long, `cause` the hash of
 * the message that is being answered, `offer` and `answer` those of the messages with them, `replied` to the challenge.
 * @typedef {{state: string, sinceS: number, lateS: number, ask: number, cause: string | null, offer: string,
 *   answer: string, challenge: Bytes, replied: boolean}} Attempt
 * @type {Attempt}
 */
const APART = { state: "apart", sinceS: -Infinity, lateS: Infinity, ask: 0, cause: null, offer: "", answer: "",
  challenge: NOTHING, replied: false };

/**
 * A message from a mailbox: to which address it came, and whether since the check before.
 * @typedef {{message: Message, own: Own, fresh: boolean}} Found
 *
 * What is known of a mailbox: `at` is the cursor, -1 before the first check; `held` how many messages it has, as far as
 * is known; `readS` when it was last read to its end, `zeroS` the same from 0, `asksZero` if the check under way does.
 * @typedef {{at: number, held: number, readS: number, zeroS: number, asksZero: boolean}} Box
 *
 * @typedef {(message: Message, fresh: boolean) => Promise<string>} Does
 */

// ---------------------------------------------------------------------------------------
// The machine of one contact. What a private method is for is said in connectoid.py, which
// has the same ones; here is said what differs.
// ---------------------------------------------------------------------------------------

/**
 * The machine of one contact: events and the time in, effects out. It never throws but UsageError, and takes one event
 * after the other. `kept` is what it has of the other, `attempt` the state of CONNECTING, `dropped` counts refused
 * messages by reason.
 */
export class Contact {
  /** @param {Suite} suite @param {Kept} kept @param {Allowed} [allowed] */
  constructor(suite, kept, allowed = {}) {
    this.kept = kept;
    this.attempt = APART;
    /** @type {Record<string, number>} */
    this.dropped = {};
    this._suite = suite;
    this._allowed = allowed;
    /** @type {Promise<unknown>} */
    this._last = Promise.resolve();
    /** @type {Now} */
    this._now = { wallUs: 0, monotonicS: 0 };
    /** @type {Effect[]} */
    this._effects = [];
    this._gone = false;
    this._wanted = false;
    this._failed = 0; // attempts in a row in which both answered, and no channel came
    this._activeUntilS = this._fastUntilS = this._beginS = -Infinity;
    /** @type {Map<string, number>} */
    this._repeatedS = new Map(); // when a type was last sent as a reply that may be asked for often
    /** @type {Found[]} */
    this._asks = []; // numbered messages of a round
    /** @type {Map<string, Box>} */
    this._boxes = new Map(); // by the mailbox's key
    /** @type {Set<string>} */
    this._seen = new Set();
  }

  // -- Beginnings --------------------------------------------------------------------

  /**
   * Return a new contact with `kept.invitation` for a link, and what to do; throw UsageError for bad relays.
   * @param {Suite} suite @param {Now} now @param {string} name @param {Relay[]} relays
   * @param {Allowed & {lifetimeUs?: number}} [options] @returns {Promise<[Contact, Effect[]]>}
   */
  static async invite(suite, now, name, relays, { lifetimeUs = INVITATION_US, ...allowed } = {}) {
    const invited = await makeOwn(suite, relays, allowed);
    const [privateKey, signer] = await suite.makeKey("ECDSA");
    const r = encodeBase64url(suite.random(SECRET_BYTES));
    const fourth = encodeBase64url(concat(suite.random(SECRET_BYTES), await hashCommitment(signer, r)));
    const dots = relays[relays.length - 1][1] === null ? ".." : ".";
    const invitation = `${invited.address}${dots}${fourth}`;
    const contact = new Contact(suite, { ...BLANK, role: "inviter", state: "invited", name, relays, privateKey, signer,
      expiresUs: now.wallUs + lifetimeUs, invitation, linkHash: await hashLink(invitation), r, invited }, allowed);
    contact._fastUntilS = now.monotonicS + POLL_FAST_FOR_S;
    contact._noteNew(invited, now);
    return [contact, [{ do: "save", kept: contact.kept }]];
  }

  /**
   * Return a new contact for somebody's invitation, and what to do; throw LinkError, UsageError. Nothing is sent before
   * the user has confirmed, so call this after that. Without relays of one's own those of the link are used.
   * @param {Suite} suite @param {Now} now @param {string} name @param {Invitation} invitation
   * @param {Allowed & {relays?: Relay[]}} [options] @returns {Promise<[Contact, Effect[]]>}
   */
  static async open(suite, now, name, { address, text }, { relays = [], ...allowed } = {}) {
    const mailboxes = await checkAddress(suite, address, allowed).catch((error) => {
      throw new LinkError(`This link is damaged: ${error.message}. Copy it again, whole.`);
    });
    if (!relays.length) relays = mailboxes.map(({ url, ext }) => [url, ext]);
    const [privateKey, signer] = await suite.makeKey("ECDSA");
    const contact = new Contact(suite, { ...BLANK, role: "opener", state: "opened", name, relays, privateKey, signer,
      expiresUs: now.wallUs + INVITATION_US, invitation: text, linkHash: await hashLink(text),
      current: await makeOwn(suite, relays, allowed), contactAddress: address }, allowed);
    return [contact, [{ do: "save", kept: contact.kept }, ...await contact.connect(now)]];
  }

  // -- Events: what the app wants, what the time does ----------------------------------

  /** Want a connection. @param {Now} now */
  connect(now) {
    return this._step(now, async () => {
      this._wanted = true;
      this._failed = 0;
      this._activeUntilS = now.monotonicS + ACTIVE_S;
      await this._turn("begin");
    });
  }

  /** Want no connection: close what there is. @param {Now} now */
  disconnect(now) {
    return this._step(now, async () => {
      this._wanted = false;
      this._activeUntilS = -Infinity;
      await this._turn("stop");
    });
  }

  /** Let time go by: at the start, and again at `nextTickS`. @param {Now} now */
  tick(now) {
    return this._step(now, async () => {
      if (this.kept.expiresUs < RELEASE_US && RELEASE_US <= now.wallUs) {
        this._keep({ expiresUs: now.wallUs + INVITATION_US }); // it was reckoned by a clock that was not set
      }
      if (this.kept.expiresUs <= now.wallUs && now.wallUs < MAX_SEQ / 2) await this._expire();
      if (this.kept.state === "welcomed" && !this.kept.welcome && this.attempt.state === "apart") {
        await this._sendWelcome(null); // the page was closed before it could
      }
      if (now.monotonicS >= this.attempt.lateS) await this._turn("late");
      else if (this._wants() && now.monotonicS >= this._beginS) await this._turn("begin");
    });
  }

  /** End the sharing: name and connection go at once, the other is told for 30 days. @param {Now} now */
  unshare(now) {
    return this._step(now, async () => {
      if (!PAIRING.has(`${this.kept.state} leave`)) throw new UsageError("The sharing is ended already.");
      await this._turn("stop");
      await this._pair("leave");
    });
  }

  /**
   * Mark that the user has compared the string with the other by voice; throw UsageError before there is one.
   * @param {Now} now @param {{same?: boolean}} [result]
   */
  verify(now, { same = true } = {}) {
    return this._step(now, async () => {
      if (!this.kept.comparison.length) {
        throw new UsageError("There is nothing to compare yet: the other has not answered.");
      }
      this._keep({ verified: same });
    });
  }

  /** Use other relays from now on, and tell the contact; throw UsageError. @param {Now} now @param {Relay[]} relays */
  move(now, relays) {
    return this._step(now, async () => {
      if (!["ready", "paired"].includes(this.kept.state)) {
        throw new UsageError("Share again: a link holds the relays that it was made with.");
      }
      await this._rotate(relays);
      this._wanted = true;
      this._activeUntilS = now.monotonicS + ACTIVE_S;
      await this._turn("stop");
      await this._turn("begin");
    });
  }

  // -- Events: what WebRTC says --------------------------------------------------------

  /** Take what was gathered; null if WebRTC failed. @param {Now} now @param {number} ask @param {Sdp | null} sdp */
  gathered(now, ask, sdp) {
    return this._hear(now, ask, "gathered", sdp);
  }

  /** Begin to prove to each other: the data channel is open. @param {Now} now @param {number} ask */
  channelOpened(now, ask) {
    return this._hear(now, ask, "channel");
  }

  /** Take what came before `connected`: a binary message. @param {Now} now @param {number} ask @param {Bytes} octets */
  channelMessage(now, ask, octets) {
    return this._hear(now, ask, "octets", octets);
  }

  /** Notice that the channel is closed. @param {Now} now @param {number} ask */
  channelClosed(now, ask) {
    return this._hear(now, ask, "closed");
  }

  /** @param {Now} now @param {number} ask @param {string} event @param {...unknown} args */
  _hear(now, ask, event, ...args) {
    return this._step(now, async () => {
      if (ask === this.attempt.ask) await this._turn(event, ...args);
    });
  }

  // -- Events: what relays say ---------------------------------------------------------

  /**
   * Take what one round of checks found: for each mailbox read to its end, [at, data] in order. A mailbox that could
   * not be asked, or not read to its end, is not among them.
   * @param {Now} now @param {ReadonlyMap<string, [at: number, data: string][]>} boxes
   */
  polled(now, boxes) {
    return this._step(now, async () => {
      /** @type {Found[]} */
      const found = [];
      for (const own of this._owns()) {
        for (const [{ pub }, key] of pairs(own)) {
          const boxed = boxes.get(pub);
          if (boxed) found.push(...await this._readAll(own, key, pub, boxed));
        }
      }
      // Those that begin a contact come first; of the others only the newest asks for something.
      found.sort((one, other) => order(one) - order(other));
      for (const item of found) await this._orDrop(() => this._take(item));
      await this._act();
    });
  }

  /** The mailboxes that are polled. */
  get mailboxes() {
    return this._owns().flatMap(pairs).map(([mailbox]) => mailbox);
  }

  /**
   * Return the mailboxes at a relay to check now, at most `pollGapS` apart.
   * @param {Now} now @param {string} url @returns {Poll[]}
   */
  polls(now, url) {
    return this._owns().flatMap(pairs).filter(([mailbox]) => mailbox.url === url).map(([mailbox, key]) => {
      const box = this._box(mailbox.pub);
      box.asksZero = now.monotonicS - box.zeroS >= ZERO_EVERY_S;
      return { mailbox, key, at: box.asksZero ? 0 : box.at };
    });
  }

  /** Return the seconds between two checks; where it is 2, a check may wait instead. @param {Now} now */
  pollGapS(now) {
    return now.monotonicS < this._fastUntilS ? POLL_FAST_S : POLL_SLOW_S;
  }

  /** When `tick` has something to do, by the monotonic clock; at the latest in an hour. */
  get nextTickS() {
    const beginS = this._wants() ? this._beginS : Infinity;
    return Math.min(this.attempt.lateS, beginS, this._now.monotonicS + ZERO_EVERY_S);
  }

  // -- Steps, and both tables ------------------------------------------------------------

  /** @param {Now} now @param {() => Promise<void>} work @returns {Promise<Effect[]>} */
  _step(now, work) {
    const run = this._last.then(async () => {
      const { kept, attempt } = this;
      this._now = now;
      this._effects = [];
      try {
        await work();
      } catch (error) {
        Object.assign(this, { kept, attempt });
        throw error;
      }
      /** @type {Effect[]} */
      const saves = this.kept === kept || this._gone ? [] : [{ do: "save", kept: this.kept }];
      return [...saves, ...this._effects];
    });
    this._last = run.catch(() => {});
    return run;
  }

  /** @param {string} event @param {...unknown} args */
  async _pair(event, ...args) {
    const rule = PAIRING.get(`${this.kept.state} ${event}`);
    if (!rule) throw new Refused("unexpected", `${event} while ${this.kept.state}`);
    this._keep({ state: await this._follow(rule, args) });
  }

  /** @param {string} event @param {...unknown} args */
  async _turn(event, ...args) {
    const rule = CONNECTING.get(`${this.attempt.state} ${event}`);
    if (!rule) return;
    const state = await this._follow(rule, args);
    if (state !== this.attempt.state) this._set({ state, sinceS: this._now.monotonicS });
    if (!RESTLESS.includes(state)) this._set({ lateS: Infinity });
  }

  /** @param {Rule} rule @param {unknown[]} args @returns {Promise<string>} */
  async _follow(rule, args) {
    const state = await /** @type {any} */ (this)[`_${rule.does}`](...args);
    if (!rule.then.includes(state)) throw new Error(`${rule.state} on ${rule.event} cannot lead to ${state}`);
    return state;
  }

  /** @param {Partial<Kept>} changes */
  _keep(changes) {
    const { kept } = this;
    const names = /** @type {(keyof Kept)[]} */ (Object.keys(changes));
    if (names.some((name) => changes[name] !== kept[name])) this.kept = { ...kept, ...changes };
  }

  /** @param {Partial<Attempt>} changes */
  _set(changes) {
    this.attempt = { ...this.attempt, ...changes };
  }

  /** @param {Effect} effect */
  _do(effect) {
    this._effects.push(effect);
  }

  /** @param {string} event */
  _tell(event) {
    this._do({ do: "tell", event });
  }

  _wants() {
    const wanted = this._wanted || LASTING.includes(this.kept.state);
    return wanted && this.attempt.state === "apart" && ["paired", ...LASTING].includes(this.kept.state);
  }

  /** @param {number} seconds */
  _lateIn(seconds) {
    this._set({ lateS: this._now.monotonicS + seconds });
  }

  // -- Reading -------------------------------------------------------------------------

  /** @param {Own} own @param {Key} key @param {string} pub @param {[number, string][]} boxed */
  async _readAll(own, key, pub, boxed) {
    const box = this._box(pub);
    const nowS = this._now.monotonicS;
    const fresh = nowS - box.readS <= FRESH_S;
    /** @type {Found[]} */
    const found = [];
    for (const [, data] of boxed) {
      await this._orDrop(async () => void found.push({ message: await this._read(own, key, data), own, fresh }));
    }
    const zero = box.asksZero || box.at < 0;
    Object.assign(box, { at: Math.max(box.at, 0, ...boxed.map(([at]) => at)), readS: nowS,
      zeroS: zero ? nowS : box.zeroS, held: (zero ? 0 : box.held) + boxed.length });
    return found;
  }

  /** @param {string} pub */
  _box(pub) {
    const box = this._boxes.get(pub) ?? { at: -1, held: 0, readS: -Infinity, zeroS: -Infinity, asksZero: false };
    this._boxes.set(pub, box);
    return box;
  }

  /** @param {Own} own @param {Key} key @param {string} data */
  async _read(own, key, data) {
    const digest = encodeBase64url(await sha256(toUtf8(data)));
    if (this._seen.has(digest)) throw new Refused("replay");
    this._seen.add(digest);
    const [oldest] = this._seen;
    if (this._seen.size > MAX_SEEN) this._seen.delete(oldest);
    const message = await readJws(await openMessage(this._suite, key, data));
    if (message.payload.to !== own.address) throw new Refused("recipient");
    return message;
  }

  /** @param {() => Promise<void>} work */
  async _orDrop(work) {
    try {
      await work();
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      this._count(error.reason);
    }
  }

  /** @param {string} reason */
  _count(reason) {
    this.dropped[reason] = (this.dropped[reason] ?? 0) + 1;
  }

  /** @param {Found} found */
  async _take(found) {
    const { message, own, fresh } = found;
    if (message.type === "hello") await this._checkHello(message, own);
    else if (UNNUMBERED.includes(message.type)) await this._checkWelcome(message);
    else this._checkNumbered(message, own);
    await checkSignature(this._suite, message);
    await checkAddress(this._suite, message.payload.connectoid, this._allowed);
    if (UNNUMBERED.includes(message.type)) await this._pair(message.type, message, fresh);
    else await this._accepted(found);
    this._fastUntilS = this._now.monotonicS + POLL_FAST_FOR_S;
    this._activeUntilS = this._now.monotonicS + ACTIVE_S;
  }

  /** @param {Message} message @param {Own} own */
  async _checkHello(message, own) {
    if (this.kept.role !== "inviter" || own.address !== this.kept.invited?.address) throw new Refused("unexpected");
    const { secret } = parseInvitation(this.kept.invitation, KNOWN);
    const proof = toUtf8(await prove(secret, message.jws));
    if (!isSame(proof, toUtf8(String(message.proof)))) throw new Refused("proof");
  }

  /** @param {Message} message */
  async _checkWelcome({ payload, hash }) {
    if (hash === this.kept.welcomeHash) throw new Refused("replay"); // the copy in another mailbox
    if (this.kept.role !== "opener" || !this.kept.invitation) throw new Refused("unexpected");
    const { commitment } = parseInvitation(this.kept.invitation, KNOWN);
    if (!isSame(await hashCommitment(payload.from, payload.r), commitment)) throw new Refused("commitment");
    if (payload.re !== this.kept.helloHash) throw new Refused("reply");
  }

  /** @param {Message} message @param {Own} own */
  _checkNumbered({ type, payload }, own) {
    const elsewhere = type !== "unshare" && own.address === this.kept.invited?.address;
    if (!NUMBERED_FOR[this.kept.role].includes(type) || elsewhere) throw new Refused("unexpected");
    if (payload.from !== this.kept.contact) throw new Refused("sender");
    if (payload.seq <= this.kept.seenSeq) throw new Refused("replay");
  }

  /** @param {Found} found */
  async _accepted(found) {
    const { message: { payload, type }, own } = found;
    if (this.kept.state === "ended") throw new Refused("unexpected"); // by an earlier message of this round
    this._keep({ seenSeq: payload.seq, contactAddress: payload.connectoid });
    if (own.address === this.kept.pending?.address) {
      this._keep({ current: own, pending: null, former: this.kept.current });
    }
    await this._pair(type === "unshare" ? "unshare" : "message", found.message);
    this._asks.push(found);
  }

  // -- Pairing: what PAIRING names -----------------------------------------------------

  /** @type {Does} */
  async _bind(message, fresh) {
    const { invitation, signer, r } = this.kept;
    this._keep({ helloHash: message.hash, contact: message.payload.from, contactAddress: message.payload.connectoid,
      comparison: await comparisonString(invitation, message.jws, signer, r) });
    this._wanted = true;
    await this._welcomeFor(message, fresh);
    return "welcomed";
  }

  /** @param {Message} message @param {boolean} fresh */
  async _welcomeFor(message, fresh) {
    if (fresh) await this._turn("offer", message); // the welcome goes out with the answer
    else await this._sendWelcome(null);
  }

  /** @type {Does} */
  async _greet(message, fresh) {
    if (message.hash !== this.kept.helloHash) return this._warn(message, fresh);
    if (this.kept.welcome && this._mayRepeat("welcome")) {
      await this._post(message.payload.connectoid, this.kept.welcome);
    } else if (!this.kept.welcome && this.attempt.state === "apart") {
      await this._welcomeFor(message, fresh);
    }
    return this.kept.state;
  }

  /** @type {Does} */
  async _warn(message, fresh) {
    const told = this._effects.some((effect) => effect.do === "tell" && effect.event === "opened_twice");
    if (!told && (fresh || !this.kept.usedTo.includes(message.hash))) this._tell("opened_twice");
    return this._refuse(message, fresh);
  }

  /** @type {Does} */
  async _refuse(message, fresh) {
    const { usedTo } = this.kept;
    const again = usedTo.includes(message.hash) && !fresh;
    if (!again && usedTo.length < MAX_USED && this._mayRepeat("used")) {
      this._keep({ usedTo: [...usedTo, message.hash] });
      await this._sendUsed(message.payload.connectoid, message.hash);
    }
    return this.kept.state;
  }

  /** @param {Message} message */
  async _accept(message) {
    this._tell("paired");
    const { from, r, connectoid } = message.payload;
    const { invitation, hello, helloHash } = this.kept;
    this._keep({ contact: from, contactAddress: connectoid, welcomeHash: message.hash,
      comparison: await comparisonString(invitation, hello, from, r), invitation: "", hello: "" });
    if (message.sdp && this.attempt.offer === helloHash && this.attempt.state === "waiting") {
      await this._turn("answer", message);
      await this._say("ready", message.hash);
    } else {
      await this._turn("welcome", message);
    }
    return "ready";
  }

  _confirm() {
    if (this.kept.role === "inviter") {
      this._tell("paired");
      this._wanted = true;
      if (this.attempt.state === "joining") this._lateIn(AGAIN_AFTER_ANSWER_S);
    } else {
      this._keep({ expiresUs: NEVER_US });
    }
    return "paired";
  }

  _goOn() {
    return "paired";
  }

  async _withdraw() {
    const { state, contactAddress, helloHash } = this.kept;
    if (state === "welcomed") await this._sendUsed(contactAddress, helloHash); // all that an opener can check so far
    else if (state === "ready" || state === "paired" || helloHash) await this._say("unshare", null);
    this._keep({ name: "", relays: [], hello: "", welcome: "", comparison: [], verified: false,
      expiresUs: this._now.wallUs + TOMBSTONE_US });
    return "unshared";
  }

  /** @param {Message} message */
  async _part(message) {
    if (this._mayRepeat("unshare")) await this._say("unshare", message.hash);
    return "unshared";
  }

  /** @param {Message} message */
  async _partLate(message) {
    this._keep({ contact: message.payload.from, contactAddress: message.payload.connectoid });
    return this._part(message);
  }

  _vanish() {
    this._gone = true;
    this._do({ do: "forget" });
    return "ended";
  }

  /** @param {string} why */
  async _end(why) {
    await this._turn("stop");
    const { role, state, name, linkHash } = this.kept;
    this.kept = { ...BLANK, role, state, name, linkHash, why, expiresUs: NEVER_US };
    this._tell(why);
    return "ended";
  }

  _endUsed() {
    return this._end("used");
  }

  _endUnshared() {
    return this._end("unshared");
  }

  async _partExpired() {
    await this._turn("stop");
    this._tell("expired");
    return this._withdraw();
  }

  _endExpired() {
    return this._end("expired");
  }

  async _expire() {
    if (PAIRING.has(`${this.kept.state} expire`)) await this._pair("expire");
    else this._keep({ invitation: "", r: "", welcome: "", invited: null, expiresUs: NEVER_US }); // the contact stays
  }

  // -- Connecting: what CONNECTING names -----------------------------------------------

  async _act() {
    const asks = this._asks.splice(0).reverse();
    for (const { message, fresh } of this.kept.state === "paired" ? asks : []) {
      const { type, sdp, payload } = message;
      if (type === "offer" || type === "ready") {
        const busy = ["joining", "proving", "connected"].includes(this.attempt.state);
        if (sdp || !busy) await this._turn(sdp && fresh ? "offer" : "stale", message);
        return;
      }
      if (type === "call" || payload.re === this.attempt.offer) {
        await this._turn(type, message);
        return;
      }
    }
  }

  async _begin() {
    if (!["paired", ...LASTING].includes(this.kept.state)) return "apart";
    this._beginS = this._now.monotonicS + AGAIN_IDLE_S;
    if (this.kept.role === "inviter") return this._call();
    if (!this.kept.hello) return this._offer();
    await this._post(this.kept.contactAddress, this.kept.hello);
    this._lateIn(AGAIN_AFTER_OFFER_S);
    return "waiting";
  }

  /** @param {Message} [message] */
  async _call(message) {
    this._leave();
    this._close();
    await this._say("call", message?.hash ?? null);
    this._lateIn(AGAIN_AFTER_OFFER_S);
    return "waiting";
  }

  /** @param {Message} [message] */
  _offer(message) {
    return this._gather(null, message?.hash ?? null);
  }

  /** @param {Message} message */
  _offerUnlessCrossed(message) {
    const crossed = this._now.monotonicS - this.attempt.sinceS < NEW_OFFER_S;
    return crossed && message.payload.re !== this.attempt.offer ? this.attempt.state : this._offer(message);
  }

  /** @param {Message} message */
  _takeOffer(message) {
    return this._gather(message.sdp, message.hash);
  }

  /** @param {Sdp | null} offer @param {string | null} cause */
  _gather(offer, cause) {
    this._leave();
    const ask = this.attempt.ask + 1;
    this.attempt = { ...APART, state: "gathering", sinceS: this._now.monotonicS, ask, cause };
    this._lateIn(GATHERED_S);
    this._do({ do: "gather", ask, offer });
    return "gathering";
  }

  /** @param {Sdp | null} [sdp] */
  async _sendSdp(sdp = null) {
    this._lateIn(AGAIN_AFTER_OFFER_S);
    if (this.kept.state === "welcomed") {
      await this._sendWelcome(sdp);
      return sdp ? "joining" : "apart";
    }
    if (!sdp) return "waiting";
    if (this.kept.role === "opener") {
      this._set({ offer: await this._sendOffer(sdp) });
      return "waiting";
    }
    const { cause } = this.attempt;
    this._set({ offer: cause ?? "", answer: await this._say("answer", cause, { sdpAnswer: sdp }) });
    this._lateIn(AGAIN_AFTER_ANSWER_S);
    return "joining";
  }

  /** @param {Sdp} sdpOffer */
  async _sendOffer(sdpOffer) {
    const { state, welcomeHash, contactAddress, invitation } = this.kept;
    if (state === "ready") return this._say("ready", welcomeHash, { sdpOffer });
    if (state === "paired") return this._say("offer", this.attempt.cause, { sdpOffer });
    const nonce = encodeBase64url(this._suite.random(SECRET_BYTES));
    const jws = await this._sign("hello", contactAddress, null, { nonce, sdpOffer });
    const { secret } = parseInvitation(invitation, KNOWN);
    this._keep({ hello: `${jws}.${await prove(secret, jws)}`, helloHash: await hashJws(jws) });
    await this._post(contactAddress, this.kept.hello);
    return this.kept.helloHash;
  }

  /** @param {Message} message */
  _join(message) {
    this._set({ answer: message.hash });
    this._do({ do: "join", ask: this.attempt.ask, answer: /** @type {Sdp} */ (message.sdp) });
    this._lateIn(AGAIN_AFTER_ANSWER_S);
    return "joining";
  }

  _again() {
    const leftS = this._activeUntilS - this._now.monotonicS;
    if (this.kept.state === "welcomed" && leftS > 0) {
      this._lateIn(leftS); // only the opener may try again
      return this.attempt.state;
    }
    const answered = this.attempt.state !== "waiting";
    this._failed += Number(answered);
    if (leftS > 0 && this._failed < MAX_UNREACHABLE) return this._begin();
    this._tell(answered ? "unreachable" : "unanswered");
    this._close();
    return "apart";
  }

  async _challenge() {
    const challenge = this._suite.random(CHALLENGE_BYTES);
    const [{ pub }] = parseAddress(this.kept.contactAddress, KNOWN);
    this._set({ challenge });
    this._lateIn(AGAIN_AFTER_ANSWER_S);
    const octets = await this._suite.seal(pub, this._channelContext(), challenge);
    this._do({ do: "write", ask: this.attempt.ask, octets });
    return "proving";
  }

  /** @param {Bytes} octets */
  async _prove(octets) {
    const { ask, replied, challenge } = this.attempt;
    if (!replied) {
      const opened = await this._openChallenge(octets);
      if (opened.length === CHALLENGE_BYTES) {
        this._set({ replied: true });
        this._do({ do: "write", ask, octets: opened });
        return "proving";
      }
    } else if (isSame(octets, challenge)) {
      this._failed = 0;
      this._tell("connected");
      if (PAIRING.has(`${this.kept.state} proven`)) await this._pair("proven");
      return "connected";
    }
    this._count("channel");
    this._close();
    return "waiting";
  }

  /** @param {Bytes} octets */
  async _openChallenge(octets) {
    for (const { keys } of this._owns()) {
      try {
        return await this._suite.open(keys[0], this._channelContext(), octets);
      } catch (error) {
        if (!(error instanceof Refused)) throw error;
      }
    }
    return NOTHING;
  }

  _channelContext() {
    const { offer, answer } = this.attempt;
    return concat(CONTEXTS.channel, Uint8Array.of(0), decodeBase64url(offer), decodeBase64url(answer));
  }

  _awaitAgain() {
    return "waiting";
  }

  _lose() {
    this._wanted = false;
    this._tell("disconnected");
    return "apart";
  }

  _stop() {
    if (this.attempt.state !== "apart") this._close();
    return "apart";
  }

  _leave() {
    if (this.attempt.state === "connected") this._tell("disconnected");
  }

  _close() {
    this._do({ do: "close", ask: this.attempt.ask });
    this._set({ offer: "" });
  }

  // -- Sending -------------------------------------------------------------------------

  _owns() {
    const { invited, pending, current, former } = this.kept;
    return [invited, pending, current, former].filter((own) => own !== null);
  }

  /** @param {string} kind */
  _mayRepeat(kind) {
    if (this._now.monotonicS - (this._repeatedS.get(kind) ?? -Infinity) < REPEAT_S) return false;
    this._repeatedS.set(kind, this._now.monotonicS);
    return true;
  }

  _isRotationDue() {
    const ageUs = this._now.wallUs - this.kept.rotatedUs;
    const current = this.kept.current ? pairs(this.kept.current) : [];
    const crowded = current.some(([{ pub }]) => this._box(pub).held >= CROWDED_MESSAGES);
    return crowded || ageUs < 0 || ageUs >= ROTATION_US;
  }

  async _rotate(relays = this.kept.relays) {
    const pending = await makeOwn(this._suite, relays, this._allowed);
    // An address that was announced and not yet used stays polled: the contact may know no other.
    this._keep({ pending, former: this.kept.pending ?? this.kept.former, relays, rotatedUs: this._now.wallUs });
    this._noteNew(pending, this._now);
  }

  /** @param {Own} own @param {Now} now */
  _noteNew(own, now) {
    for (const [{ pub }] of pairs(own)) this._box(pub).readS = now.monotonicS;
  }

  /** @param {string} kind @param {string | null} re @param {object} [members] */
  async _say(kind, re, members) {
    if (!this.kept.pending && this.kept.relays.length && this._isRotationDue()) await this._rotate();
    const jws = await this._sign(kind, this.kept.contactAddress, re, members);
    await this._post(this.kept.contactAddress, jws);
    return hashJws(jws);
  }

  /** @param {Sdp | null} sdp */
  async _sendWelcome(sdp) {
    await this._rotate();
    const { contactAddress, helloHash, r } = this.kept;
    const jws = await this._sign("welcome", contactAddress, helloHash, { r, ...(sdp && { sdpAnswer: sdp }) });
    this._keep({ welcome: jws, welcomeHash: await hashJws(jws) });
    this._set({ offer: helloHash, answer: this.kept.welcomeHash });
    this._mayRepeat("welcome");
    await this._post(contactAddress, jws);
  }

  /** @param {string} address @param {string} re */
  async _sendUsed(address, re) {
    await this._post(address, await this._sign("used", address, re, { r: this.kept.r }));
  }

  /** @param {string} type @param {string} to @param {string | null} re @param {object} [members] */
  async _sign(type, to, re, members) {
    const believedUs = this._now.wallUs < MAX_SEQ / 2 ? this._now.wallUs : 0;
    this._keep({ seq: Math.max(believedUs, this.kept.seq + 1) });
    const { pending, current, signer, seq, privateKey } = this.kept;
    const announced = (type !== "used" && (pending ?? current)) || this._owns()[0];
    return signJws(this._suite, privateKey,
      { type, to, from: signer, seq, re, connectoid: announced.address, ...members });
  }

  /** @param {string} address @param {string} text */
  async _post(address, text) {
    for (const mailbox of parseAddress(address, KNOWN)) {
      this._do({ do: "send", mailbox, data: await sealMessage(this._suite, mailbox.pub, text) });
    }
    this._fastUntilS = this._now.monotonicS + POLL_FAST_FOR_S;
  }
}

/** @param {Found} found */
const order = ({ message: { type, payload } }) => (UNNUMBERED.includes(type) ? 0 : payload.seq);

/** @param {Own} own @returns {[Mailbox, Key][]} */
const pairs = ({ address, keys }) => parseAddress(address, KNOWN).map((box, place) => [box, keys[place]]);

/**
 * Return a new address with a key for each relay; throw UsageError for bad relays.
 * @param {Suite} suite @param {Relay[]} relays @param {Allowed} allowed
 */
async function makeOwn(suite, relays, allowed) {
  const keys = await Promise.all(relays.map(() => suite.makeKey("ECDH")));
  try {
    relays.flat().forEach((text) => checkText("", text));
    const address = formatAddress(relays.map(([url, ext], place) => ({ pub: keys[place][1], url, ext })));
    await checkAddress(suite, address, allowed);
    return { address, keys: keys.map(([key]) => key) };
  } catch (error) {
    throw new UsageError(`These relays make no address: ${/** @type {Error} */ (error).message}.`);
  }
}

// ---------------------------------------------------------------------------------------
// The store: IndexedDB, where keys stay CryptoKeys that nothing can read, so a backup or
// another browser cannot have them. One page at a time runs contacts (Web Locks).
// ---------------------------------------------------------------------------------------

const LOCK_WAIT_S = 1; // a page that is loaded anew waits for its former self

/** Keep contacts in IndexedDB: `await Store.open()`. */
export class Store {
  /** @param {IDBDatabase} db @param {() => void} release */
  constructor(db, release) {
    this._db = db;
    this._release = release;
    db.onversionchange = () => this.close();
  }

  /** Return the store of this name, for this page alone; throw StoreError. */
  static async open(name = "connectoid", { indexedDB, locks } = browserStorage()) {
    if (!indexedDB || !locks) {
      throw new StoreError("This page cannot keep contacts: open it over https, in a newer browser.");
    }
    const release = await lock(locks, name);
    try {
      const request = indexedDB.open(name, RECORD_VERSION);
      request.onupgradeneeded = () => request.result.createObjectStore("contacts", { autoIncrement: true });
      return new Store(await done(request), release);
    } catch (error) {
      release();
      throw storeError(error);
    }
  }

  /** Return the records by their ids; throw StoreError, RecordError. @returns {Promise<Map<number, Kept>>} */
  async load() {
    const [numbers, records] = await this._use("readonly", (all) => (
      Promise.all([done(all.getAllKeys()), done(all.getAll())])));
    return new Map(numbers.map((number, place) => [Number(number), checkKept(records[place])]));
  }

  /** Keep a new record durably and return its id. @param {Kept} kept */
  async add(kept) {
    return Number(await this._use("readwrite", (all) => done(all.add(kept))));
  }

  /** Replace a record durably. @param {number} number @param {Kept} kept */
  async save(number, kept) {
    await this._use("readwrite", (all) => done(all.put(kept, number)));
  }

  /** Delete a record. @param {number} number */
  async delete(number) {
    await this._use("readwrite", (all) => done(all.delete(number)));
  }

  /** Let another page use it. */
  close() {
    this._db.close();
    this._release();
  }

  /** @template T @param {IDBTransactionMode} mode @param {(all: IDBObjectStore) => Promise<T>} work */
  async _use(mode, work) {
    try {
      const transaction = this._db.transaction("contacts", mode, { durability: "strict" });
      const committed = new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = () => reject(transaction.error);
      });
      const [result] = await Promise.all([work(transaction.objectStore("contacts")), committed]);
      return result;
    } catch (error) {
      throw storeError(error);
    }
  }
}

const browserStorage = () => ({ indexedDB: globalThis.indexedDB, locks: globalThis.navigator?.locks });

/** @template T @param {IDBRequest<T>} request @returns {Promise<T>} */
const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

/** @param {any} error */
function storeError(error) {
  const full = error?.name === "QuotaExceededError";
  return new StoreError(full ? "The storage of this browser is full: free some, then go on."
    : `This browser does not keep data for this page: ${error?.message}. Allow it, or leave private browsing.`);
}

/** @param {LockManager} locks @param {string} name @returns {Promise<() => void>} */
function lock(locks, name) {
  return new Promise((resolve, reject) => {
    const inUse = () => reject(new StoreError("This app is open in another tab: use that one, or close it."));
    const held = () => new Promise((release) => resolve(() => release(undefined)));
    locks.request(`connectoid ${name}`, { signal: AbortSignal.timeout(1_000 * LOCK_WAIT_S) }, held).catch(inUse);
  });
}

// ---------------------------------------------------------------------------------------
// The client of a relay: fetch, and nothing believed. PROTOCOL.md, "Operations", "Guards".
// ---------------------------------------------------------------------------------------

const REQUEST_TIMEOUT_S = 10;
const MAX_REPLY_BYTES = 1_048_576; // 100 messages in 512 KiB, with their JSON
const MAX_RETRY_S = 900;
const MAX_ERROR_CHARS = 200;
const MAX_BATCH_CHECKS = 256;
const RECEIVE_LIMIT = 100;
const MAX_RECEIVES = 16; // of one mailbox in a round: more than a box holds

/**
 * What a page or a test hands in: `sleep` ends early when its signal says so.
 * @typedef {object} System
 * @property {typeof globalThis.fetch} fetch
 * @property {() => Now} now
 * @property {(seconds: number, signal?: AbortSignal) => Promise<void>} sleep
 * @property {any} page the window: events and `document.visibilityState`
 */

/** @returns {System} */
function browserSystem() {
  let [wallMs, performanceMs, monotonicMs] = [Date.now(), performance.now(), 0];
  return {
    fetch: (...args) => globalThis.fetch(...args),
    now() {
      // performance.now() may stand still while the machine sleeps, the wall clock does not.
      const [wall, elapsed] = [Date.now(), performance.now()];
      monotonicMs += Math.max(wall - wallMs, elapsed - performanceMs, 0);
      [wallMs, performanceMs] = [wall, elapsed];
      return { wallUs: wall * 1_000, monotonicS: monotonicMs / 1_000 };
    },
    sleep: (seconds, signal) => new Promise((resolve) => {
      const end = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", end);
        resolve();
      };
      const timer = setTimeout(end, 1_000 * Math.min(Math.max(seconds, 0), ZERO_EVERY_S));
      signal?.addEventListener("abort", end);
      if (signal?.aborted) end();
    }),
    page: globalThis,
  };
}

/** Ask one relay. */
export class RelayClient {
  /** @param {string} url @param {Pick<System, "fetch" | "sleep">} [system] */
  constructor(url, system = browserSystem()) {
    this.url = url;
    this._system = system;
  }

  /**
   * Return the reply to a request, an object with `ok` true or the list of a batch; throw RelayError.
   * @param {unknown} request @param {number} [waitS] @param {AbortSignal} [signal] @returns {Promise<any>}
   */
  async ask(request, waitS = 0, signal) {
    // text/plain spares the preflight
    const init = { method: "POST", body: JSON.stringify(request), headers: { "Content-Type": "text/plain" } };
    const reply = await this._exchange(init, waitS, signal);
    if (isObject(reply) && reply.ok !== true) {
      throw new RelayError(`${this.url} says "${printable(reply.error)}".`, retryOf(reply));
    }
    return reply;
  }

  /** Return what a relay says of itself; throw RelayError. @returns {Promise<Record<string, any>>} */
  async document() {
    const reply = await this._exchange({ headers: { Accept: "application/json" } }, 0);
    return isObject(reply) ? reply : {};
  }

  /** @param {RequestInit} init @param {number} waitS @param {AbortSignal} [signal] */
  async _exchange(init, waitS, signal) {
    const [abort, over] = [new AbortController(), new AbortController()];
    const end = () => abort.abort();
    this._system.sleep(REQUEST_TIMEOUT_S + waitS, over.signal).then(end);
    signal?.addEventListener("abort", end);
    try {
      signal?.throwIfAborted();
      const response = await this._system.fetch(this.url, { ...init, redirect: "error", credentials: "omit",
        cache: "no-store", referrerPolicy: "no-referrer", signal: abort.signal });
      const reply = parseJson(await readBody(response));
      if (typeof reply !== "object" || reply === null) throw new RangeError("neither an object nor a list");
      return reply;
    } catch (error) {
      throw new RelayError(`${this.url} cannot be reached: ${printable(error)}.`);
    } finally {
      signal?.removeEventListener("abort", end);
      over.abort();
    }
  }
}

/** Return what a stranger's server says, in our words. @param {any} error */
const printable = (error) => String(error?.message ?? error).slice(0, MAX_ERROR_CHARS).replace(/[^ -~]/g, " ");

/** @param {Response} response */
async function readBody(response) {
  const reader = response.body?.getReader();
  let octets = NOTHING;
  for (;;) {
    const { value, done } = await reader?.read() ?? { done: true };
    if (done) return octets;
    octets = concat(octets, /** @type {Bytes} */ (value));
    if (octets.length > MAX_REPLY_BYTES) {
      reader?.cancel().catch(() => {});
      throw new RangeError("a reply over 1 MiB");
    }
  }
}

/** @param {unknown} error */
const retryS = (error) => (error instanceof RelayError ? error.retryS : 0);

/** @param {any} reply */
const retryOf = (reply) => (reply?.retry > 0 ? Math.min(Number(reply.retry), MAX_RETRY_S) : 0);

/**
 * Return [at, data] of each mailbox that could be read to its end; throw RelayError if none can be asked.
 * @param {Suite} suite @param {RelayClient} client @param {Poll[]} polls @param {number} waitS
 * @param {AbortSignal} [signal]
 */
export async function readMailboxes(suite, client, polls, waitS, signal) {
  const checks = polls.map(({ mailbox: { pub, ext }, at }) => ({ pub, ext, action: "check", at, wait: waitS }));
  const replies = await client.ask(checks, waitS, signal);
  if (!Array.isArray(replies) || replies.length !== checks.length) {
    throw new RelayError(`${client.url} did not answer a batch with as many replies.`);
  }
  /** @type {Map<string, [number, string][]>} */
  const read = new Map();
  let failed = null;
  for (const [place, poll] of polls.entries()) {
    try {
      read.set(poll.mailbox.pub, await readMailbox(suite, client, poll, replies[place]));
    } catch (error) {
      if (!(error instanceof RelayError || error instanceof Refused)) throw error;
      if (!failed || retryS(error) > failed.retryS) failed = new RelayError(error.message, retryS(error));
    }
  }
  if (failed && !read.size) throw failed;
  return read;
}

/** @param {Suite} suite @param {RelayClient} client @param {Poll} poll @param {any} reply */
async function readMailbox(suite, client, { mailbox: { pub, ext }, key, at }, reply) {
  if (reply?.ok !== true) throw new RelayError(`${client.url} refused a check.`, retryOf(reply));
  /** @type {[number, string][]} */
  const messages = [];
  if (!reply.found) return messages;
  const answer = fromAscii(await suite.open(key, CONTEXTS.question, decodeBase64url(String(reply.question))));
  for (let turn = 0; turn < MAX_RECEIVES; turn += 1) {
    const from = messages.length ? messages[messages.length - 1][0] : at;
    const found = await client.ask({ pub, ext, action: "receive", limit: RECEIVE_LIMIT, answer, at: from });
    if (!isObject(found)) throw new RelayError(`${client.url} answered a list.`);
    if (!found.messages) break;
    for (const message of Array.isArray(found.messages) ? found.messages : [null]) {
      if (!Number.isSafeInteger(message?.at) || message.at < 0 || typeof message.data !== "string") {
        throw new RelayError(`${client.url} answered messages of a wrong form.`);
      }
      messages.push([message.at, message.data]);
    }
    if (!found.messages.length) break;
  }
  return messages;
}

// ---------------------------------------------------------------------------------------
// WebRTC by RTCPeerConnection. It closes a connection only when the machine says so.
// ---------------------------------------------------------------------------------------

const CHANNEL_LABEL = "connectoid";
const GATHER_LIMIT_S = 2; // for candidates: what a STUN server has not said by then is left out
const MAX_BUFFERED_BYTES = 1_048_576; // on a data channel; more waits
const FLUSH_S = 2; // for what is buffered, when a connection is closed
const CLOSED = "The connection is closed.";

/**
 * Makes peer connections: one for each contact, the newest `ask`. Reports are (contact, event, ask, value): `gathered`
 * with an offer, an answer or null, `opened`, `message` with bytes or a string, `closed`. `write` resolves when there
 * is room for more, and rejects with NotConnectedError.
 * @typedef {(contact: number, event: string, ask: number, value?: any) => void} Report
 * @typedef {object} WebRTC
 * @property {(report: Report) => void} start
 * @property {(contact: number, ask: number, offer: Sdp | null, iceServers: Promise<RTCIceServer[]>) => void} gather
 * @property {(contact: number, ask: number, answer: Sdp) => void} join
 * @property {(contact: number, ask: number, message: Bytes | string) => Promise<void>} write
 * @property {(contact: number, ask: number) => void} close
 * @property {() => void} stop
 *
 * `tell` reports an event of this one, as long as it is not closed.
 * @typedef {{ask: number, connection?: RTCPeerConnection, channel?: RTCDataChannel, closed: boolean,
 *   tell: (event: string, value?: any) => void}} Peer
 */

/** @param {unknown} error */
const warn = (error) => console.warn("WebRTC failed:", error);

/** Make peer connections with RTCPeerConnection. @implements {WebRTC} */
export class PeerAdapter {
  /** @param {typeof RTCPeerConnection} [PeerConnection] @param {System["sleep"]} [sleep] */
  constructor(PeerConnection = globalThis.RTCPeerConnection, sleep = browserSystem().sleep) {
    this._PeerConnection = PeerConnection;
    this._sleep = sleep;
    /** @type {Map<number, Peer>} */
    this._peers = new Map();
    /** @type {Report} */
    this._report = () => {};
  }

  /** @type {WebRTC["start"]} */
  start(report) {
    this._report = report;
  }

  /** @type {WebRTC["gather"]} */
  async gather(contact, ask, offer, iceServers) {
    this._drop(contact);
    /** @type {Peer} */
    const peer = { ask, closed: false, tell: (event, value) => {
      if (!peer.closed) this._report(contact, event, ask, value);
    } };
    this._peers.set(contact, peer);
    await this._describe(peer, offer, await iceServers).catch(warn);
    const local = peer.connection?.localDescription;
    peer.tell("gathered", local ? { type: local.type, sdp: local.sdp } : null);
  }

  /** @type {WebRTC["join"]} */
  join(contact, ask, answer) {
    this._of(contact, ask)?.connection?.setRemoteDescription(answer).catch(warn);
  }

  /** @type {WebRTC["write"]} */
  async write(contact, ask, message) {
    const channel = this._of(contact, ask)?.channel;
    if (channel?.readyState !== "open") throw new NotConnectedError(CLOSED);
    channel.send(/** @type {any} */ (message));
    if (channel.bufferedAmount > MAX_BUFFERED_BYTES) {
      await new Promise((resolve) => {
        for (const event of ["bufferedamountlow", "close"]) channel.addEventListener(event, resolve, { once: true });
      });
    }
  }

  /** @type {WebRTC["close"]} */
  close(contact, ask) {
    if (this._of(contact, ask)) this._drop(contact);
  }

  stop() {
    for (const contact of this._peers.keys()) this._drop(contact);
  }

  /** @param {number} contact @param {number} ask */
  _of(contact, ask) {
    const peer = this._peers.get(contact);
    return peer?.ask === ask ? peer : undefined;
  }

  /** @param {Peer} peer @param {Sdp | null} offer @param {RTCIceServer[]} iceServers */
  async _describe(peer, offer, iceServers) {
    if (peer.closed) return;
    const connection = peer.connection = new this._PeerConnection({ iceServers });
    connection.onconnectionstatechange = () => {
      // One that never was open has its time all the same.
      if (peer.channel && ["failed", "closed"].includes(connection.connectionState)) peer.tell("closed");
    };
    if (offer) {
      connection.ondatachannel = ({ channel }) => this._watch(peer, channel);
      await connection.setRemoteDescription(offer);
    } else {
      this._watch(peer, connection.createDataChannel(CHANNEL_LABEL));
    }
    await connection.setLocalDescription(); // an answer, if there is an offer
    const gathered = new Promise((resolve) => {
      connection.onicegatheringstatechange = () => connection.iceGatheringState === "complete" && resolve(null);
    });
    if (connection.iceGatheringState !== "complete") await Promise.race([gathered, this._sleep(GATHER_LIMIT_S)]);
  }

  /** @param {Peer} peer @param {RTCDataChannel} channel */
  _watch(peer, channel) {
    if (peer.channel || channel.label !== CHANNEL_LABEL) return;
    peer.channel = channel;
    channel.binaryType = "arraybuffer";
    channel.bufferedAmountLowThreshold = MAX_BUFFERED_BYTES / 2;
    channel.onmessage = ({ data }) => peer.tell("message", typeof data === "string" ? data : new Uint8Array(data));
    channel.onclose = () => peer.tell("closed");
    channel.onopen = () => peer.tell("opened");
    if (channel.readyState === "open") peer.tell("opened");
  }

  /** @param {number} contact */
  async _drop(contact) {
    const peer = this._peers.get(contact);
    this._peers.delete(contact);
    if (!peer) return;
    peer.closed = true;
    for (let waitedS = 0; waitedS < FLUSH_S && peer.channel?.readyState === "open"; waitedS += 0.05) {
      if (!peer.channel.bufferedAmount) break;
      await this._sleep(0.05);
    }
    peer.connection?.close();
  }
}

const LACKS_WEBRTC = "WebRTC is missing or off here: contacts can be seen and ended, but not connected.";
/** Make no connections. @type {WebRTC} */
const NO_WEBRTC = {
  start() {}, gather() {}, join() {}, close() {}, stop() {},
  write: () => Promise.reject(new NotConnectedError(LACKS_WEBRTC)),
};

// ---------------------------------------------------------------------------------------
// The runner: moves what the machines ask for. A line is everything that goes to one relay,
// so that a dead relay holds up no other.
// ---------------------------------------------------------------------------------------

const CHECK_EVERY_S = 2; // between the starts of two checks at one relay, at least
const WAIT_S = 60; // of a long poll: what a relay takes at most
const BACKOFF_S = [2, 5, 15, 30, 60]; // after failures of a relay, one after the other
const JITTER = 0.25; // of every pause, so that many clients do not come back together
const SEND_FOR_S = 45; // what could not be sent by then, the machine sends anew
const STOP_S = 2; // for what is still to be sent, when the runner is closed
const LEARN_S = 1; // that an offer waits for the STUN servers of relays

/** A connection to a contact: messages of the app, in order, bytes or strings, up to 64 KiB each. */
export class Channel {
  /** @param {Connectoid} runner @param {number} contact @param {number} ask */
  constructor(runner, contact, ask) {
    this.ask = ask;
    this.closed = false;
    this._runner = runner;
    this._contact = contact;
    /** @type {(Bytes | string | null)[]} */
    this._came = [];
    /** @type {((message: Bytes | string | null) => unknown) | null} */
    this._listener = null;
    this._arrived = () => {};
  }

  /** Send a message; resolve when there is room for more; throw NotConnectedError. @param {Bytes | string} message */
  async send(message) {
    if (this.closed) throw new NotConnectedError(CLOSED);
    await this._runner.webrtc.write(this._contact, this.ask, message);
  }

  /** Return the next message; throw NotConnectedError once it is closed and empty. For one caller at a time. */
  async receive() {
    while (!this._came.length) await new Promise((resolve) => { this._arrived = () => resolve(null); });
    const message = this._came[0];
    if (message === null) throw new NotConnectedError(CLOSED);
    this._came.shift();
    return message;
  }

  /** Return the messages up to the end of the connection: `for await (const message of channel)`. */
  async* [Symbol.asyncIterator]() {
    for (;;) {
      try {
        yield await this.receive();
      } catch (error) {
        if (error instanceof NotConnectedError) return;
        throw error;
      }
    }
  }

  /**
   * Have a function called with each message, those that came already first; null is the end.
   * @param {(message: Bytes | string | null) => unknown} listener
   */
  listen(listener) {
    for (const message of this._came.splice(0)) listener(message);
    this._listener = listener;
  }

  /** Disconnect; what the other sent before may still be received. Idempotent. */
  async close() {
    if (this.closed) return;
    this.take(null);
    await this._runner.hangUp(this._contact);
  }

  /** Take a message from the other, or the end. @param {Bytes | string | null} message */
  take(message) {
    if (this.closed) return;
    this.closed = message === null;
    if (this._listener) this._listener(message);
    else this._came.push(message);
    this._arrived();
  }
}

/** What goes to one relay. */
class Line {
  /** @param {Connectoid} runner @param {string} url */
  constructor(runner, url) {
    this.url = url;
    this._runner = runner;
    this._client = new RelayClient(url, runner.system);
    this._known = new Set(); // the mailboxes of the last round
    this._slow = false; // a pause goes on that was meant for an idle time
    this._woken = new AbortController();
    /** @type {[untilS: number, letter: object][]} */
    this._letters = [];
    /** @type {Promise<void> | null} */
    this.sending = null;
    /** @type {string | undefined} */
    this.stun = undefined;
    this.learned = this._learn();
    this._pollOn();
  }

  /** @param {Mailbox} mailbox @param {string} data */
  send({ pub, ext }, data) {
    this._letters.push([this._runner.nowS() + SEND_FOR_S, { pub, ext, action: "send", data }]);
    this.sending ??= this._sendOn().finally(() => { this.sending = null; });
  }

  /** Let a check begin as soon as it may, in place of one that waits. */
  wake() {
    this._woken.abort();
  }

  /** Wake if what is to be polled has changed, or is to be polled sooner. */
  notice() {
    const hurried = this._slow && this._runner.pollGapS() < POLL_SLOW_S;
    const unknown = this._runner.mailboxes().some(({ url, pub }) => url === this.url && !this._known.has(pub));
    if (hurried || unknown) this.wake();
  }

  async _learn() {
    try {
      const { protocol, hostname, port } = new URL(this.url);
      const { stun } = await this._client.document();
      this.stun = stun === true ? `stun:${hostname}:${port || (protocol === "https:" ? 443 : 80)}` : "";
    } catch (error) {
      this._runner.complain(error);
    }
  }

  async _pollOn() {
    for (let failures = 0; !this._runner.stopped;) {
      const beganS = this._runner.nowS();
      this._woken = new AbortController();
      let pauseS = CHECK_EVERY_S;
      try {
        await this._pollOnce();
        failures = 0;
        pauseS = Math.max(CHECK_EVERY_S, this._runner.pollGapS());
      } catch (error) {
        if (!this._woken.signal.aborted) {
          this._runner.complain(error);
          pauseS = backoffS(error, failures);
          failures += 1;
        }
      }
      await this._rest(beganS, pauseS);
    }
  }

  /**
   * Wait for the rest of a pause; being woken shortens it to what a relay asks for at least.
   * @param {number} beganS @param {number} pauseS
   */
  async _rest(beganS, pauseS) {
    const { sleep } = this._runner.system;
    this._slow = pauseS > CHECK_EVERY_S;
    await sleep(beganS + pauseS - this._runner.nowS(), this._woken.signal);
    if (!this._runner.stopped) await sleep(beganS + CHECK_EVERY_S - this._runner.nowS());
    this._slow = false;
  }

  async _pollOnce() {
    const polls = this._runner.polls(this.url);
    this._known = new Set(polls.map(([, { mailbox }]) => mailbox.pub));
    const { signal } = this._woken;
    for (let start = 0; start < polls.length; start += MAX_BATCH_CHECKS) {
      const part = polls.slice(start, start + MAX_BATCH_CHECKS);
      const waits = part.length === polls.length && !signal.aborted && this._runner.mayWait();
      const asked = part.map(([, poll]) => poll);
      const read = await readMailboxes(this._runner.suite, this._client, asked, waits ? WAIT_S : 0, signal);
      await this._runner.take(read, part);
    }
    if (this.stun === undefined && polls.length) {
      this.stun = ""; // the relay was away when it was first asked: once more
      await this._learn();
    }
  }

  async _sendOn() {
    for (let letter = this._letters.shift(); letter; letter = this._letters.shift()) {
      const [untilS, request] = letter;
      for (let turn = 0; ; turn += 1) {
        let pauseS;
        try {
          await this._client.ask(request);
          break;
        } catch (error) {
          this._runner.complain(error);
          pauseS = backoffS(error, turn);
        }
        if (this._runner.stopped || this._runner.nowS() + pauseS > untilS) break;
        await this._runner.system.sleep(pauseS);
      }
    }
  }
}

/** @param {unknown} error @param {number} failures before it */
function backoffS(error, failures) {
  const pauseS = Math.max(retryS(error), BACKOFF_S[Math.min(failures, BACKOFF_S.length - 1)]);
  return pauseS * (1 + JITTER * Math.random());
}

/**
 * @typedef {(contact: Contact, now: Now) => Promise<Effect[]>} Step
 * @typedef {{contact: Contact, kept: Kept, name: string, channel: Channel | null, last: Promise<unknown>,
 *   waiting: number}} Entry
 */

/** @param {string | Relay} relay @returns {Relay} */
const asRelay = (relay) => (typeof relay === "string" ? [relay, null] : relay);

/**
 * Run the contacts of one store. `relays` are for new contacts: URLs, or [URL, ext]. `onEvent(name, event)` is called
 * with a key of EVENTS, `onProblem` with an error whose text tells the user what to do. `iceServers` are more than the
 * STUN of the relays: TURN. Everything that throws throws ConnectoidErrors.
 */
export class Connectoid {
  /**
   * @param {Pick<Store, "load" | "add" | "save" | "delete" | "close">} store @param {(string | Relay)[]} [relays]
   * @param {Partial<System> & Allowed & {webrtc?: WebRTC, iceServers?: RTCIceServer[], suite?: Suite,
   *   onEvent?: (name: string, event: string) => void, onProblem?: (error: Error) => void}} [options]
   */
  constructor(store, relays = [], options = {}) {
    const { allowHttp, webrtc, iceServers = [], suite, onEvent, onProblem = console.warn, ...system } = options;
    this.relays = relays.map(asRelay);
    this.system = { ...browserSystem(), ...system };
    this.suite = suite ?? new SystemSuite();
    this.webrtc = webrtc ?? (globalThis.RTCPeerConnection ? new PeerAdapter() : NO_WEBRTC);
    this.stopped = false;
    this._store = store;
    this._iceServers = iceServers;
    this._allowed = { allowHttp };
    this._onEvent = onEvent ?? (() => {});
    this._onProblem = onProblem;
    this._paused = false;
    /** @type {Map<number, Entry>} */
    this._entries = new Map();
    /** @type {Map<string, Line>} */
    this._lines = new Map();
    this._complaints = new Set();
    this._changed = new AbortController();
    this._ended = new AbortController(); // nothing of the page is of interest any more
    /** @type {Promise<unknown>} */
    this._adopting = Promise.resolve();
  }

  /** Load the contacts, begin to poll and to connect; throw StoreError, RecordError. */
  async start() {
    for (const [number, kept] of await this._store.load()) {
      this._enter(number, new Contact(this.suite, kept, this._allowed));
    }
    if (this.webrtc === NO_WEBRTC) this.complain(new ConnectoidError(LACKS_WEBRTC));
    this.webrtc.start((...report) => this._reported(...report));
    const { page } = this.system;
    const { signal } = this._ended;
    for (const event of ["online", "pageshow", "pagehide"]) page.addEventListener?.(event, this._onPage, { signal });
    page.document?.addEventListener("visibilitychange", this._onPage, { signal });
    for (const number of this._entries.keys()) this._try(number, (contact, now) => contact.tick(now));
    this._drawLines();
    this._tickOn();
  }

  /** Disconnect all, let waiting messages go and close the store. Idempotent. */
  async close() {
    this._ended.abort();
    await this._hangUpAll();
    this.stopped = true;
    const over = new AbortController();
    const sent = Promise.all([...this._lines.values()].map(({ sending }) => sending));
    await Promise.race([sent, this.system.sleep(STOP_S, over.signal)]);
    over.abort();
    this._wake();
    this._change();
    this.webrtc.stop();
    this._store.close();
  }

  // -- What an app does ----------------------------------------------------------------

  /**
   * Return a link for a new contact; throw UsageError for a name that is taken, or no relays.
   * @param {string} name @param {string} appUrl
   */
  share(name, appUrl) {
    return this._alone(async () => {
      await this._checkNew(name);
      const made = await Contact.invite(this.suite, this._now(), name, this.relays, this._allowed);
      await this._adopt(...made);
      return makeLink(appUrl, made[0].kept.invitation);
    });
  }

  /**
   * Open somebody's link, after the user has confirmed; return the contact's name, throw LinkError, UsageError. The
   * same link again goes on with the contact that it made, by the name that it has.
   * @param {string} link @param {string} name
   */
  open(link, name) {
    return this._alone(async () => {
      const invitation = readLink(link, this._allowed);
      const linkHash = await hashLink(invitation.text);
      const known = this._all().find(({ kept }) => kept.linkHash === linkHash);
      if (known?.kept.role === "inviter") throw new LinkError("This is your own link: send it to somebody else.");
      if (known) return known.kept.name;
      await this._checkNew(name);
      const options = { relays: this.relays, ...this._allowed };
      await this._adopt(...await Contact.open(this.suite, this._now(), name, invitation, options));
      return name;
    });
  }

  /**
   * Return a channel to a contact, once it is there; throw NotConnectedError, UsageError.
   * @param {string} name @param {{timeoutS?: number}} [options]
   */
  async connect(name, { timeoutS = Infinity } = {}) {
    const number = this._number(name);
    const untilS = this.nowS() + timeoutS;
    const former = this._entries.get(number)?.channel;
    if (former && !former.closed) return former;
    await this._run(number, (contact, now) => contact.connect(now));
    for (;;) {
      const { channel, kept } = this._entries.get(number) ?? {};
      if (channel && channel !== former) return channel;
      if (!kept || ["ended", "unshared"].includes(kept.state) || this.stopped) {
        throw new NotConnectedError(EVENTS[kept?.why ?? ""] ?? "The sharing has ended.");
      }
      const leftS = untilS - this.nowS();
      if (leftS <= 0) throw new NotConnectedError(`${name} is not there. ${EVENTS.unanswered}`);
      await this.system.sleep(leftS, this._changed.signal);
    }
  }

  /** Close the connection to a contact; throw UsageError. @param {string} name */
  async disconnect(name) {
    await this.hangUp(this._number(name));
  }

  /** End the sharing with a contact, who is told; throw UsageError. @param {string} name */
  async unshare(name) {
    await this._run(this._number(name), (contact, now) => contact.unshare(now));
  }

  /**
   * Be reached by a contact through other relays from now on, or those of this runner; throw UsageError. The contact is
   * told, through his own relays. Until he has written to the new address the former one is polled.
   * @param {string} name @param {(string | Relay)[]} [relays]
   */
  async move(name, relays = this.relays) {
    await this._run(this._number(name), (contact, now) => contact.move(now, relays.map(asRelay)));
  }

  /** Delete what is kept of a contact that has ended; throw UsageError for any other. @param {string} name */
  async forget(name) {
    const number = this._number(name);
    if (this._entries.get(number)?.kept.state !== "ended") {
      throw new UsageError(`${name} is still a contact: unshare ends it.`);
    }
    await this._run(number, async () => [{ do: "forget" }]);
  }

  /**
   * Mark whether the comparison strings were the same; throw UsageError.
   * @param {string} name @param {{same?: boolean}} [result]
   */
  async verify(name, result) {
    await this._run(this._number(name), (contact, now) => contact.verify(now, result));
  }

  /** Return what is kept of all contacts, tombstones left out, and in `attempt` what goes on to connect. */
  contacts() {
    return this._all().filter(({ kept }) => kept.state !== "unshared")
      .map(({ kept, contact }) => ({ ...kept, attempt: contact.attempt.state }));
  }

  // -- What the lines and channels ask ---------------------------------------------------

  nowS() {
    return this._now().monotonicS;
  }

  /** Return what is to be polled at a relay, with the contact's id. @param {string} url @returns {[number, Poll][]} */
  polls(url) {
    if (this._paused) return [];
    return [...this._entries].flatMap(([number, { contact }]) => contact.polls(this._now(), url)
      .map((poll) => /** @type {[number, Poll]} */ ([number, poll])));
  }

  mailboxes() {
    return this._all().flatMap(({ contact }) => contact.mailboxes);
  }

  pollGapS() {
    return Math.min(POLL_SLOW_S, ...this._all().map(({ contact }) => contact.pollGapS(this._now())));
  }

  /** A hidden page that expects nothing asks once a minute. */
  mayWait() {
    return !this._isHidden() || this.pollGapS() < POLL_SLOW_S;
  }

  /**
   * Give what a round has found to the contacts.
   * @param {Map<string, [number, string][]>} read @param {[number, Poll][]} polls
   */
  async take(read, polls) {
    this._complaints.clear();
    await Promise.all([...new Set(polls.map(([number]) => number))].map((number) => {
      const pubs = polls.filter(([owner]) => owner === number).map(([, { mailbox }]) => mailbox.pub);
      const boxes = new Map([...read].filter(([pub]) => pubs.includes(pub)));
      return this._try(number, (contact, now) => contact.polled(now, boxes));
    }));
  }

  /** Tell the app of what goes wrong, once. @param {any} error */
  complain(error) {
    if (this.stopped || this._complaints.has(error.message)) return;
    this._complaints.add(error.message);
    queueMicrotask(() => this._onProblem(error));
  }

  /** @param {number} number */
  async hangUp(number) {
    await this._run(number, (contact, now) => contact.disconnect(now));
  }

  // -- Effects -------------------------------------------------------------------------

  /**
   * Do what a machine asks for, in order, before its next step: what could not be saved is not sent.
   * @param {number} number @param {Step} step
   */
  _run(number, step) {
    const entry = this._entries.get(number);
    if (!entry) return Promise.resolve();
    entry.waiting += 1;
    const run = entry.last.then(async () => {
      try {
        if (!this._entries.has(number)) return;
        for (const effect of await step(entry.contact, this.system.now())) await this._doOne(number, entry, effect);
      } catch (error) {
        // What is saved counts, whatever else the machine believes; messages are read once more.
        if (!(error instanceof UsageError)) entry.contact = new Contact(this.suite, entry.kept, this._allowed);
        throw error;
      } finally {
        entry.waiting -= 1;
      }
      this._drawLines();
      this._change();
    });
    entry.last = run.catch(() => {});
    return run;
  }

  /** @param {number} number @param {Step} step */
  async _try(number, step) {
    await this._run(number, step).catch((error) => this.complain(error));
  }

  /** @param {number} number @param {Entry} entry @param {Effect} effect */
  async _doOne(number, entry, effect) {
    const { webrtc } = this;
    if (effect.do === "save") {
      await this._store.save(number, effect.kept);
      entry.kept = effect.kept;
    } else if (effect.do === "forget") {
      await this._store.delete(number);
      this._entries.delete(number);
    } else if (effect.do === "send") {
      this._line(effect.mailbox.url).send(effect.mailbox, effect.data);
    } else if (effect.do === "gather") {
      entry.channel?.take(null);
      webrtc.gather(number, effect.ask, effect.offer, this._servers(entry.contact));
    } else if (effect.do === "join") {
      webrtc.join(number, effect.ask, effect.answer);
    } else if (effect.do === "write") {
      webrtc.write(number, effect.ask, effect.octets).catch(() => {}); // it is closed, and will say so
    } else if (effect.do === "close") {
      entry.channel?.take(null);
      webrtc.close(number, effect.ask);
    } else {
      this._tell(number, entry, effect.event);
    }
  }

  /** @param {number} number @param {Entry} entry @param {string} event */
  _tell(number, entry, event) {
    if (event === "connected") entry.channel = new Channel(this, number, entry.contact.attempt.ask);
    if (event === "disconnected") entry.channel?.take(null);
    queueMicrotask(() => this._onEvent(entry.name, event));
  }

  /** @type {Report} */
  _reported(number, event, ask, value) {
    const entry = this._entries.get(number);
    if (!entry || this.stopped) return;
    const take = () => entry.channel?.ask === ask && (entry.channel.take(value), true); // nothing if it is closed
    if (event === "message" && !entry.waiting && take()) return; // the way of all data: no machine
    this._try(number, async (contact, now) => {
      if (event === "gathered") return contact.gathered(now, ask, value);
      if (event === "opened") return contact.channelOpened(now, ask);
      if (event === "closed") return contact.channelClosed(now, ask);
      return take() ? [] : contact.channelMessage(now, ask, typeof value === "string" ? NOTHING : value);
    });
  }

  // -- The rest ------------------------------------------------------------------------

  _now() {
    return this.system.now();
  }

  _all() {
    return [...this._entries.values()];
  }

  /** @template T @param {() => Promise<T>} work @returns {Promise<T>} */
  _alone(work) {
    const run = this._adopting.then(work);
    this._adopting = run.catch(() => {});
    return run;
  }

  /** @param {number} number @param {Contact} contact */
  _enter(number, contact) {
    const { kept } = contact;
    const { name } = this._entries.get(number) ?? kept; // a tombstone has none, and its end is told
    this._entries.set(number, { contact, kept, name, channel: null, last: Promise.resolve(), waiting: 0 });
  }

  /** @param {Contact} contact @param {Effect[]} effects */
  async _adopt(contact, effects) {
    const number = await this._store.add(contact.kept);
    this._enter(number, contact);
    await this._run(number, async () => effects);
  }

  /** @param {string} name */
  async _checkNew(name) {
    if (!name) throw new UsageError("A contact needs a name.");
    for (const [number, { kept }] of [...this._entries].filter(([, entry]) => entry.kept.name === name)) {
      if (kept.state !== "ended") throw new UsageError(`There is a contact "${name}" already.`);
      await this._run(number, async () => [{ do: "forget" }]);
    }
  }

  /** @param {string} name */
  _number(name) {
    for (const [number, { kept }] of this._entries) if (kept.name === name) return number;
    throw new UsageError(`There is no contact "${name}".`);
  }

  /** @param {Contact} contact @returns {Promise<RTCIceServer[]>} */
  async _servers(contact) {
    const lines = [...new Set(contact.mailboxes.map(({ url }) => this._line(url)))];
    await Promise.race([Promise.all(lines.map(({ learned }) => learned)), this.system.sleep(LEARN_S)]);
    return [...lines.filter(({ stun }) => stun).map(({ stun }) => ({ urls: String(stun) })), ...this._iceServers];
  }

  /** @param {string} url */
  _line(url) {
    const line = this._lines.get(url) ?? new Line(this, url);
    this._lines.set(url, line);
    return line;
  }

  _drawLines() {
    for (const url of new Set(this.mailboxes().map((mailbox) => mailbox.url))) this._line(url).notice();
  }

  _isHidden() {
    return this.system.page.document?.visibilityState === "hidden";
  }

  async _hangUpAll() {
    await Promise.all([...this._entries.keys()].map((number) => (
      this._try(number, (contact, now) => contact.disconnect(now)))));
  }

  _wake() {
    for (const line of this._lines.values()) line.wake();
  }

  _change() {
    this._changed.abort();
    this._changed = new AbortController();
  }

  async _tickOn() {
    while (!this.stopped) {
      const due = [...this._entries].filter(([, { contact }]) => contact.nextTickS <= this.nowS());
      await Promise.all(due.map(([number]) => this._try(number, (contact, now) => contact.tick(now))));
      const soonestS = Math.min(Infinity, ...this._all().map(({ contact }) => contact.nextTickS));
      if (!this.stopped) await this.system.sleep(Math.max(0.05, soonestS - this.nowS()), this._changed.signal);
    }
  }

  /** A page that is left may never come back: the others learn at once that it went. @param {{type: string}} event */
  _onPage = ({ type }) => {
    if (type === "pagehide") {
      this._hangUpAll();
      this.webrtc.stop(); // at once: what is above may have no time left
    }
    this._paused = type === "pagehide" || (this._paused && type !== "pageshow");
    if (!this._isHidden()) this._wake();
    this._change();
  };
}
