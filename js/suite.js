// @ts-check
/**
 * Cryptography: the context strings, the machine's interface to it, and the real suite.
 *
 * P-384 with HPKE (RFC 9180), ES384 (RFC 7518, section 3.4), HMAC-SHA256 and SHA-256, all by Web
 * Crypto. A private key is a value that only its suite understands. PROTOCOL.md, "Keys".
 * @module
 */

import {
  NOTHING, PUB_FORM, concat, decodeBase64url, encodeBase64url, toUtf8,
} from "./encoding.js";
import { ConnectoidError, OtherAppError, Refused } from "./errors.js";
import { APP_HASH_BYTES } from "./limits.js";
import { parseAddress } from "./links.js";

/** @import { Bytes } from "./encoding.js" */
/** @import { Allowed, Invitation } from "./links.js" */

export const CONTEXTS = {
  question: toUtf8("connectoid/1 question"),
  message: toUtf8("connectoid/1 message"),
  channel: toUtf8("connectoid/1 channel"),
  emoji: toUtf8("connectoid/1 emoji"),
  renew: toUtf8("connectoid/1 renew"),
  app: toUtf8("connectoid/1 app"),
};

/**
 * A private key, as its suite made it.
 * @typedef {any} Key
 * @typedef {"ECDH" | "ECDSA"} Use
 *
 * The cryptography that the machine of a contact is handed.
 * @typedef {object} Suite
 * @property {(count: number) => Bytes} random
 *   returns so many random bytes
 * @property {(use: Use) => Promise<[Key, string]>} makeKey
 *   returns a key for one use, with its public key in the form of `pub`
 * @property {(pub: string) => Promise<void>} check
 *   throws Refused (address) unless it is a point of the curve
 * @property {(pub: string, context: Bytes, plaintext: Bytes) => Promise<Bytes>} seal
 *   returns enc || ciphertext; throws Refused (address)
 * @property {(key: Key, context: Bytes, sealed: Bytes) => Promise<Bytes>} open
 *   returns the plaintext; throws Refused (seal)
 * @property {(key: Key, octets: Bytes) => Promise<Bytes>} sign
 *   returns r || s of ES384
 * @property {(pub: string, signature: Bytes, octets: Bytes) => Promise<void>} verify
 *   throws Refused (signature)
 */

// ---------------------------------------------------------------------------------------
// The suite for real.
// ---------------------------------------------------------------------------------------

// The length of an uncompressed point.
const POINT_BYTES = 97;
const SIGNATURE_BYTES = 96;
// The length of SHA-384, of the K of HPKE, and of a coordinate.
const HASH_BYTES = 48;
const KEY_BYTES = 32;
const NONCE_BYTES = 12;
const ES384 = { name: "ECDSA", hash: "SHA-384" };

/**
 * Encrypt and sign with Web Crypto.
 *
 * A key is a CryptoKeyPair that cannot leave the browser. IndexedDB keeps it as it is.
 * @implements {Suite}
 */
export class SystemSuite {
  /** @param {Crypto} [crypto] */
  constructor(crypto = globalThis.crypto) {
    if (!crypto?.subtle) {
      throw new ConnectoidError(
        "This page cannot encrypt: open it over https, in a newer browser.");
    }
    this._crypto = crypto;
    this._subtle = crypto.subtle;
  }

  /** @type {Suite["random"]} */
  random(count) {
    return this._crypto.getRandomValues(new Uint8Array(count));
  }

  /** @type {Suite["makeKey"]} */
  async makeKey(use) {
    const pair = await this._subtle.generateKey(curve(use), false, KEY_USAGES[use]);
    const { publicKey } = /** @type {CryptoKeyPair} */ (pair);
    const point = compress(await this._export(publicKey));
    return [pair, encodeBase64url(point)];
  }

  /** @type {Suite["check"]} */
  async check(pub) {
    await this._import(pub, "ECDH");
  }

  /** @type {Suite["seal"]} */
  async seal(pub, context, plaintext) {
    const theirs = await this._import(pub, "ECDH");
    const [ours] = await this.makeKey("ECDH");
    const enc = await this._export(ours.publicKey);
    const points = concat(enc, await this._export(theirs));
    const { algorithm, key } = await this._schedule(ours, theirs, points, context);
    const ciphertext = await this._subtle.encrypt(algorithm, key, plaintext);
    return concat(enc, new Uint8Array(ciphertext));
  }

  /** @type {Suite["open"]} */
  async open(ours, context, sealed) {
    try {
      const enc = sealed.slice(0, POINT_BYTES);
      if (enc[0] !== 4) throw new RangeError("another form of points");
      const theirs = await this._subtle.importKey("raw", enc, curve("ECDH"), true, []);
      const points = concat(enc, await this._export(ours.publicKey));
      const { algorithm, key } = await this._schedule(ours, theirs, points, context);
      const ciphertext = sealed.slice(POINT_BYTES);
      return new Uint8Array(await this._subtle.decrypt(algorithm, key, ciphertext));
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
    if (!(await this._isSigned(pub, signature, octets))) throw new Refused("signature");
  }

  /**
   * @param {string} pub
   * @param {Bytes} signature
   * @param {Bytes} octets
   */
  async _isSigned(pub, signature, octets) {
    if (signature.length !== SIGNATURE_BYTES) return false;
    try {
      const key = await this._import(pub, "ECDSA");
      return await this._subtle.verify(ES384, key, signature, octets);
    } catch {
      return false;
    }
  }

  /** @param {CryptoKey} key */
  async _export(key) {
    return new Uint8Array(await this._subtle.exportKey("raw", key));
  }

  /**
   * @param {string} pub
   * @param {Use} use
   */
  async _import(pub, use) {
    try {
      if (!PUB_FORM.test(pub)) throw new RangeError("not compressed");
      const point = decodeBase64url(pub);
      // Some engines take no compressed point.
      return await this._importPoint(point, use)
        .catch(() => this._importPoint(decompress(point), use));
    } catch {
      throw new Refused("address", "its key is no point of the curve");
    }
  }

  /**
   * @param {Bytes} point
   * @param {Use} use
   */
  _importPoint(point, use) {
    return this._subtle.importKey("raw", point, curve(use), true, PUBLIC_USAGES[use]);
  }

  /**
   * Return key and nonce of RFC 9180, sections 4.1 and 5.1, mode base.
   *
   * A key serves one message, so the nonce is always the first.
   * @param {CryptoKeyPair} ours
   * @param {CryptoKey} theirs
   * @param {Bytes} points enc and the recipient's
   * @param {Bytes} context
   */
  async _schedule({ privateKey }, theirs, points, context) {
    const agreement = { name: "ECDH", public: theirs };
    const dh = await this._subtle.deriveBits(agreement, privateKey, 8 * HASH_BYTES);
    const prk = await extract(NOTHING, KEM, "eae_prk", new Uint8Array(dh));
    const shared = await expand(prk, KEM, "shared_secret", points, HASH_BYTES);
    const pskIdHash = await extract(NOTHING, HPKE, "psk_id_hash", NOTHING);
    const infoHash = await extract(NOTHING, HPKE, "info_hash", context);
    const schedule = concat(MODE_BASE, pskIdHash, infoHash);
    const secret = await extract(shared, HPKE, "secret", NOTHING);
    const raw = await expand(secret, HPKE, "key", schedule, KEY_BYTES);
    const iv = await expand(secret, HPKE, "base_nonce", schedule, NONCE_BYTES);
    const usages = /** @type {KeyUsage[]} */ (["encrypt", "decrypt"]);
    const key = await this._subtle.importKey("raw", raw, "AES-GCM", false, usages);
    return { algorithm: { name: "AES-GCM", iv }, key };
  }
}

/** @type {Record<Use, KeyUsage[]>} */
const KEY_USAGES = { ECDH: ["deriveBits"], ECDSA: ["sign", "verify"] };
/** @type {Record<Use, KeyUsage[]>} */
const PUBLIC_USAGES = { ECDH: [], ECDSA: ["verify"] };

/** @param {Use} name */
function curve(name) {
  return { name, namedCurve: "P-384" };
}

// ---------------------------------------------------------------------------------------
// Points of P-384. Not every engine takes compressed ones, and none gives them.
// ---------------------------------------------------------------------------------------

const P = 2n ** 384n - 2n ** 128n - 2n ** 96n + 2n ** 32n - 1n;
const B = BigInt(
  "0xb3312fa7e23ee7e4988e056be3f82d19181d9c6efe8141120314088f5013875a"
  + "c656398d8a2ed19d2a85c8edd3ec2aef");

/** @param {Bytes} raw an uncompressed point */
function compress(raw) {
  const sign = raw[POINT_BYTES - 1] & 1;
  return concat(Uint8Array.of(2 + sign), raw.slice(1, HASH_BYTES + 1));
}

/**
 * Return the uncompressed point; throw RangeError if there is none.
 * @param {Bytes} point a compressed one
 */
export function decompress(point) {
  const x = BigInt(`0x${toHex(point.slice(1))}`);
  const square = (x ** 3n - 3n * x + B) % P;
  // A square root, since P = 3 mod 4.
  const root = power(square, (P + 1n) / 4n);
  if (x >= P || (root * root - square) % P) throw new RangeError("no point of the curve");
  const isNegated = Number(root & 1n) !== point[0] - 2;
  const y = isNegated ? P - root : root;
  return concat(Uint8Array.of(4), point.slice(1), fromHex(y.toString(16)));
}

/**
 * Return base ** exponent mod P.
 * @param {bigint} base
 * @param {bigint} exponent
 */
function power(base, exponent) {
  let result = 1n;
  for (const bit of exponent.toString(2)) {
    result = (result * result) % P;
    if (bit === "1") result = (result * base) % P;
  }
  return result;
}

/** @param {Bytes} octets */
function toHex(octets) {
  return Array.from(octets, (octet) => octet.toString(16).padStart(2, "0")).join("");
}

/** @param {string} hex a coordinate */
function fromHex(hex) {
  const pairs = hex.padStart(2 * HASH_BYTES, "0").match(/../g) ?? [];
  return Uint8Array.from(pairs, (pair) => parseInt(pair, 16));
}

// ---------------------------------------------------------------------------------------
// The key schedule of HPKE: RFC 9180, section 4, with HKDF-SHA384 and AES-256-GCM.
// ---------------------------------------------------------------------------------------

// DHKEM(P-384, HKDF-SHA384).
const KEM = concat(toUtf8("KEM"), Uint8Array.of(0, 0x11));
const HPKE = concat(toUtf8("HPKE"), Uint8Array.of(0, 0x11, 0, 2, 0, 2));
const HPKE_V1 = toUtf8("HPKE-v1");
const MODE_BASE = Uint8Array.of(0);

/**
 * @param {Bytes} salt
 * @param {Bytes} suiteId
 * @param {string} label
 * @param {Bytes} ikm
 */
function extract(salt, suiteId, label, ikm) {
  return hmac("SHA-384", salt, HPKE_V1, suiteId, toUtf8(label), ikm);
}

/**
 * @param {Bytes} prk
 * @param {Bytes} suiteId
 * @param {string} label
 * @param {Bytes} context
 * @param {number} count
 */
async function expand(prk, suiteId, label, context, count) {
  const size = Uint8Array.of(0, count);
  const first = Uint8Array.of(1);
  const block = await hmac(
    "SHA-384", prk, size, HPKE_V1, suiteId, toUtf8(label), context, first);
  return block.slice(0, count);
}

/**
 * @param {"SHA-256" | "SHA-384"} hash
 * @param {Bytes} key
 * @param {...Bytes} parts
 */
async function hmac(hash, key, ...parts) {
  // Web Crypto takes no empty key; by RFC 2104 a zero byte is the same.
  const padded = key.length ? key : new Uint8Array(1);
  const algorithm = { name: "HMAC", hash };
  const made = await crypto.subtle.importKey("raw", padded, algorithm, false, ["sign"]);
  return new Uint8Array(await crypto.subtle.sign("HMAC", made, concat(...parts)));
}

// ---------------------------------------------------------------------------------------
// Hashes and proofs of the protocol.
// ---------------------------------------------------------------------------------------

/** @param {...Bytes} parts */
export async function sha256(...parts) {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", concat(...parts)));
}

/**
 * Return h, which a link holds: it pins the inviter's signing key and commits her to R.
 * @param {string} signer
 * @param {string} r
 */
export async function hashCommitment(signer, r) {
  return sha256(decodeBase64url(signer), decodeBase64url(r));
}

/**
 * Return what a link holds of an app's identifier; nothing for an app that has none.
 * @param {string} app
 */
export async function hashApp(app) {
  if (!app) return NOTHING;
  const digest = await sha256(CONTEXTS.app, Uint8Array.of(0), toUtf8(app));
  return digest.slice(0, APP_HASH_BYTES);
}

/**
 * Return the identifier that counts for a contact, nothing where the link names no app.
 * Throw OtherAppError if the link is that of another app.
 * @param {Invitation} invitation
 * @param {string} app
 */
export async function appOfContact({ appHash }, app) {
  if (!appHash.length) return "";
  if (encodeBase64url(appHash) !== encodeBase64url(await hashApp(app))) {
    throw new OtherAppError("This link belongs to another app. Open it there: it is still good.");
  }
  return app;
}

/**
 * Return a hello's fourth part, which proves that its sender has the link.
 * @param {Bytes} secret
 * @param {string} jws
 */
export async function prove(secret, jws) {
  return encodeBase64url(await hmac("SHA-256", secret, toUtf8(jws)));
}

/**
 * Return what stays of an invitation: enough to recognize a link that was opened before.
 * @param {string} invitation
 */
export async function hashLink(invitation) {
  return encodeBase64url(await sha256(toUtf8(invitation)));
}

/**
 * Return what a JWS signs (RFC 7515): its header and its payload.
 *
 * The signature is no part of a message's identity. Anybody can make a second one of it: with
 * (r, s) an ECDSA key has also signed as (r, n - s).
 * @param {string} jws
 */
export function signingInput(jws) {
  return jws.split(".").slice(0, 2).join(".");
}

/**
 * Return the hash of a message in base64url: of what its JWS signs.
 * @param {string} jws
 */
export async function hashJws(jws) {
  return encodeBase64url(await sha256(toUtf8(signingInput(jws))));
}

/**
 * Return the mailboxes of an address to write to.
 * Throw Refused (address) unless all of them can be written to.
 * @param {Suite} suite
 * @param {string} address
 * @param {Allowed} [allowed]
 */
export async function checkAddress(suite, address, allowed) {
  const mailboxes = parseAddress(address, allowed);
  for (const { pub } of mailboxes) await suite.check(pub);
  return mailboxes;
}
