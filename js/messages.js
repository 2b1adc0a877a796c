// @ts-check
/**
 * Messages between apps: the envelope from the inside out, and the members of each type.
 *
 * A text is signed (JWS), padded to one of five sizes, and sealed to a mailbox.
 * PROTOCOL.md, "Messages between apps".
 * @module
 */

import { isApp } from "./apps.js";
import {
  PUB_FORM, decodeBase64url, encodeBase64url, fromAscii, isObject, parseJson, toUtf8,
} from "./encoding.js";
import { Refused, UsageError } from "./errors.js";
import { LENGTH_BYTES, MAX_OTHER_BYTES, SIZES } from "./limits.js";
import { checkSdp } from "./sdp.js";
import { CONTEXTS, hashJws } from "./suite.js";
import { isListOfVersions } from "./versions.js";

/** @import { Key, Suite } from "./suite.js" */

/**
 * An offer or answer of WebRTC.
 * @typedef {{type: "offer" | "answer", sdp: string}} Sdp
 *
 * A message whose form is right. Its sender is only claimed until checkSignature.
 * `hash` is the `re` of a reply to it.
 * @typedef {object} Message
 * @property {string} jws in three parts
 * @property {string | null} proof
 * @property {Record<string, any>} payload
 * @property {string} type
 * @property {string} hash
 * @property {Sdp | null} sdp with nothing in it but what WebRTC may see
 */

// ---------------------------------------------------------------------------------------
// The members of each type. A member that is not here is ignored.
// ---------------------------------------------------------------------------------------

/** @typedef {(value: any) => boolean} Fits */

// 32 bytes.
const HASH_FORM = /^[\w-]{42}[AEIMQUYcgkosw048]$/;
// 16 bytes.
const RANDOM_FORM = /^[\w-]{21}[AQgw]$/;
// 96 bytes: r || s of ES384.
const SIGNATURE_FORM = /^[\w-]{128}$/;

/** @type {Fits} */
const isText = (value) => typeof value === "string";
/** @type {Fits} */
const isNull = (value) => value === null;
/** @type {Fits} */
const isPub = (value) => isText(value) && PUB_FORM.test(value);
/** @type {Fits} */
const isHash = (value) => isText(value) && HASH_FORM.test(value);
/** @type {Fits} */
const isHashOrNull = (value) => isNull(value) || isHash(value);
/** @type {Fits} */
const isRandom = (value) => isText(value) && RANDOM_FORM.test(value);
/** @type {Fits} */
const isSignature = (value) => isText(value) && SIGNATURE_FORM.test(value);
/** @type {Fits} */
const isSeq = (value) => Number.isSafeInteger(value) && value > 0;
/** @type {Fits} */
const isOffer = (value) => isObject(value) && value.type === "offer" && isText(value.sdp);
/** @type {Fits} */
const isAnswer = (value) => isObject(value) && value.type === "answer" && isText(value.sdp);
/** @type {Fits} */
const isOfferOrNone = (value) => value === undefined || isNull(value) || isOffer(value);
/** @type {Fits} */
const isAnswerOrNone = (value) => value === undefined || isNull(value) || isAnswer(value);
/** @type {Fits} */
const isAppOrNone = (value) => value === undefined || isNull(value) || isApp(value);
/** @type {Fits} */
const isVersionsOrNone = (value) => value === undefined || isNull(value) || isListOfVersions(value);

/** @type {Record<string, Fits>} */
const ALWAYS = { to: isText, from: isPub, seq: isSeq, connectoid: isText };

/** @type {Record<string, Record<string, Fits>>} */
export const MEMBERS = {
  hello: {
    re: isNull,
    nonce: isRandom,
    sdpOffer: isOffer,
    versions: isVersionsOrNone,
    app: isAppOrNone,
  },
  welcome: {
    re: isHash,
    r: isRandom,
    sdpAnswer: isAnswerOrNone,
    versions: isVersionsOrNone,
    app: isAppOrNone,
  },
  used: { re: isHash, r: isRandom },
  ready: { re: isHash, sdpOffer: isOfferOrNone },
  offer: { re: isHashOrNull, sdpOffer: isOffer },
  answer: { re: isHash, sdpAnswer: isAnswer },
  call: { re: isHashOrNull },
  moved: { re: isHashOrNull },
  renew: { re: isNull, next: isPub, proof: isSignature },
  unshare: { re: isHashOrNull },
};

/** The types that are known by their hash. All others are known by their seq. */
export const UNNUMBERED = ["hello", "welcome", "used"];

// ---------------------------------------------------------------------------------------
// Signing and reading.
// ---------------------------------------------------------------------------------------

export const HEADER = encodeBase64url(toUtf8('{"alg":"ES384","typ":"connectoid"}'));

/**
 * Return a compact JWS (RFC 7515) over a payload as JSON.
 * @param {Suite} suite
 * @param {Key} key
 * @param {Record<string, unknown>} payload
 */
export async function signJws(suite, key, payload) {
  const body = encodeBase64url(toUtf8(JSON.stringify(payload)));
  const signed = `${HEADER}.${body}`;
  const signature = await suite.sign(key, toUtf8(signed));
  return `${signed}.${encodeBase64url(signature)}`;
}

/**
 * Return the message in a JWS; throw Refused (jws, encoding, payload, sdp).
 * The signature is not checked here.
 * @param {string} text
 * @returns {Promise<Message>}
 */
export async function readJws(text) {
  const [header, body, signature, proof = null, ...more] = text.split(".");
  if (header !== HEADER || signature === undefined || more.length) throw new Refused("jws");
  const payload = parseJson(decodeBase64url(body));
  decodeBase64url(signature);
  const type = checkMembers(payload);
  if ((proof !== null) !== (type === "hello")) {
    throw new Refused("jws", "a proof is the fourth part of a hello, and of nothing else");
  }
  const jws = `${header}.${body}.${signature}`;
  return { jws, proof, payload, type, hash: await hashJws(jws), sdp: sdpOf(payload, type) };
}

/**
 * Return the type of a payload; throw Refused (payload).
 * @param {unknown} payload
 * @returns {string}
 */
function checkMembers(payload) {
  if (!isObject(payload) || !isText(payload.type) || !Object.hasOwn(MEMBERS, payload.type)) {
    throw new Refused("payload", "no known type");
  }
  const { type } = payload;
  const members = { ...ALWAYS, ...MEMBERS[type] };
  for (const [name, fits] of Object.entries(members)) {
    if (!fits(payload[name])) throw new Refused("payload", `${type} with a wrong ${name}`);
  }
  return type;
}

/**
 * Return the offer or answer in a message as WebRTC may see it; throw Refused (sdp).
 * @param {Record<string, any>} payload
 * @param {string} type
 * @returns {Sdp | null}
 */
function sdpOf(payload, type) {
  for (const name of ["sdpOffer", "sdpAnswer"]) {
    const sdp = MEMBERS[type][name] && payload[name];
    if (sdp) return { type: sdp.type, sdp: checkSdp(sdp.sdp) };
  }
  return null;
}

/**
 * Throw Refused (signature) unless `from` signed it.
 * @param {Suite} suite
 * @param {Message} message
 */
export async function checkSignature(suite, { jws, payload }) {
  const end = jws.lastIndexOf(".");
  const signature = decodeBase64url(jws.slice(end + 1));
  await suite.verify(payload.from, signature, toUtf8(jws.slice(0, end)));
}

// ---------------------------------------------------------------------------------------
// Room.
// ---------------------------------------------------------------------------------------

// Bytes of a signature, and of the proof of a hello.
const SIGNATURE_BYTES = 96;
const PROOF_BYTES = 32;

/**
 * Return how many bytes an SDP may have as JSON, beside two addresses with so many characters.
 * Every type of message has that room.
 * @param {number} addressChars
 */
export function roomForSdp(addressChars) {
  const around = `${HEADER}..${encodeBase64url(new Uint8Array(SIGNATURE_BYTES))}`;
  const proof = `.${encodeBase64url(new Uint8Array(PROOF_BYTES))}`;
  const largest = SIZES[SIZES.length - 1];
  const payloadChars = largest - LENGTH_BYTES - around.length - proof.length;
  // Four characters of base64url are three bytes.
  return Math.floor(payloadChars * 3 / 4) - MAX_OTHER_BYTES - addressChars;
}

// ---------------------------------------------------------------------------------------
// Sealing and opening.
// ---------------------------------------------------------------------------------------

/**
 * Return `data` for a mailbox; throw UsageError if the text fits in no message.
 * @param {Suite} suite
 * @param {string} pub
 * @param {string} text
 */
export async function sealMessage(suite, pub, text) {
  const octets = toUtf8(text);
  const needed = LENGTH_BYTES + octets.length;
  const size = SIZES.find((allowed) => allowed >= needed);
  if (!size) {
    const largest = SIZES[SIZES.length - 1];
    throw new UsageError(
      `A message of ${needed} bytes is over ${largest}: use fewer relays or a shorter SDP.`);
  }
  const plaintext = new Uint8Array(size);
  new DataView(plaintext.buffer).setUint32(0, octets.length);
  plaintext.set(octets, LENGTH_BYTES);
  return encodeBase64url(await suite.seal(pub, CONTEXTS.message, plaintext));
}

/**
 * Return the text in `data`; throw Refused (encoding, seal, padding, jws).
 * @param {Suite} suite
 * @param {Key} key
 * @param {string} sealed
 */
export async function openMessage(suite, key, sealed) {
  const plaintext = await suite.open(key, CONTEXTS.message, decodeBase64url(sealed));
  if (!SIZES.includes(plaintext.length)) throw new Refused("padding");
  const end = LENGTH_BYTES + new DataView(plaintext.buffer).getUint32(0);
  if (end > plaintext.length) throw new Refused("padding");
  if (plaintext.slice(end).some((octet) => octet !== 0)) throw new Refused("padding");
  const octets = plaintext.slice(LENGTH_BYTES, end);
  if (octets.some((octet) => octet > 0x7f)) throw new Refused("jws", "not ASCII");
  return fromAscii(octets);
}
