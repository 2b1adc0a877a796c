/**
 * What this library makes of inputs, one a line: `READER BASE64`. It answers each with a line of
 * JSON, which tests/library/fuzz_readers.py compares with what the library in Python makes of it.
 */

import { createInterface } from "node:readline";

import {
  Contact, LinkError, Refused, RelayClient, RelayError, checkSdp, decodeBase64url, encodeBase64url,
  openMessage, parseAddress, readJws, readLink,
} from "../connectoid.js";
import { BLANK } from "../contact/record.js";
import { parseJson, toUtf8 } from "../encoding.js";
import { CHALLENGE_BYTES } from "../limits.js";
import { HEADER } from "../messages.js";
import { isPrivateHost } from "../networks.js";
import { Budget, checkMailboxes, readMailbox } from "../relay_client.js";
import { checkUrl, originOf } from "../urls.js";

const RELAY = "https://relay.example.com/";
const POLL = { mailbox: { pub: "A", url: RELAY, ext: null }, key: "A", at: 0 };
const FOUND = '[{"ok": true, "found": true, "question": "QUJD"}]';
const NOT_FOUND = '{"ok": true, "found": false}';

// What is sealed is not, here: the seal has vectors.
const SUITE = { open: async (_key, _info, sealed) => sealed };

const NOW = { wallUs: 1_800_000_000_000_000, monotonicS: 7 };
const CHALLENGE = new Uint8Array(CHALLENGE_BYTES).fill(0x41);
const toHex = (octets) => Buffer.from(octets).toString("hex");
const toText = (octets) => Buffer.from(octets).toString("utf8");

/** Return a client whose relay gives these replies, and then the last one for ever. */
function clientOf(...replies) {
  const left = [...replies];
  const fetch = async () => new Response(left.length > 1 ? left.shift() : left[0]);
  return new RelayClient(RELAY, { fetch, sleep: () => new Promise(() => {}) });
}

async function readMessage(text) {
  const { jws, proof, payload, hash, sdp } = await readJws(text);
  const { type, to, from, seq, re, connectoid } = payload;
  return { jws, proof, hash, sdp, type, to, from, seq, re, connectoid };
}

function readInvitation(text, allowHttp) {
  const { address, secret, commitment, appHash } = readLink(text, { allowHttp });
  return { address, secrets: [secret, commitment, appHash].map(encodeBase64url) };
}

function readUrl(text, allowHttp) {
  checkUrl(text, allowHttp);
  const { scheme, host, port } = originOf(text);
  return { scheme, host, port: Number(port), isPrivate: isPrivateHost(host) };
}

async function readBoxes(...replies) {
  const client = clientOf(...replies);
  const [checked] = await checkMailboxes(client, [POLL], 0);
  return readMailbox(SUITE, client, checked, new Budget());
}

/** Return what each message on a channel leads to that is to be proven. */
async function readFrames(octets) {
  const current = { address: `A.${encodeBase64url(toUtf8(RELAY))}`, keys: ["A"] };
  const contact = new Contact(SUITE, { ...BLANK, state: "paired", expiresUs: 2 ** 52, current });
  contact.machine.setAttempt({
    state: "proving", attemptId: 1, offer: "QUJD", answer: "QUJD", challenge: CHALLENGE,
  });
  const outcomes = [];
  for (const frame of Buffer.from(octets).toString("latin1").split("|").slice(0, 3)) {
    const message = new Uint8Array(Buffer.from(frame, "latin1"));
    const effects = await contact.channelMessage(NOW, 1, message);
    const written = effects.filter((each) => each.do === "write").map((each) => toHex(each.octets));
    const told = effects.filter((each) => each.do === "tell").map(({ event }) => event);
    outcomes.push([contact.attempt.state, written, told]);
  }
  return outcomes;
}

/** Each returns what it has read, or throws; some read one input in two ways. */
const READERS = {
  base64url: [(octets) => encodeBase64url(decodeBase64url(toText(octets)))],
  json: [(octets) => Boolean([parseJson(octets)])],
  url: [
    (octets) => readUrl(toText(octets), false),
    (octets) => readUrl(toText(octets), true),
  ],
  address: [
    (octets) => parseAddress(toText(octets)),
    (octets) => parseAddress(toText(octets), { allowHttp: true }),
  ],
  link: [
    (octets) => readInvitation(toText(octets), false),
    (octets) => readInvitation(toText(octets), true),
  ],
  sdp: [(octets) => checkSdp(toText(octets))],
  jws: [(octets) => readMessage(toText(octets))],
  payload: [
    (octets) => readMessage(`${HEADER}.${encodeBase64url(octets)}.QUJD`),
    (octets) => readMessage(`${HEADER}.${encodeBase64url(octets)}.QUJD.QUJD`),
  ],
  frames: [readFrames],
  plaintext: [(octets) => openMessage(SUITE, "A", encodeBase64url(octets))],
  reply: [async (octets) => Boolean([await clientOf(octets).ask({})])],
  checked: [(octets) => readBoxes(octets, NOT_FOUND)],
  received: [(octets) => readBoxes(FOUND, octets, NOT_FOUND)],
};

/** Return what a reader makes of octets; anything but the library's own refusals is told. */
async function verdict(read, octets) {
  try {
    return { value: await read(octets) };
  } catch (error) {
    if (error instanceof Refused) return { refused: error.reason };
    if (error instanceof LinkError) return { link: error.name };
    if (error instanceof RelayError) return { relay: error.retryS };
    return { raised: String(error) };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const [name, text] = line.split(" ");
  const octets = new Uint8Array(Buffer.from(text, "base64"));
  const verdicts = [];
  for (const read of READERS[name]) verdicts.push(await verdict(read, octets));
  process.stdout.write(`${JSON.stringify(verdicts)}\n`);
}
