/**
 * What a real runner is fuzzed in: a clock that jumps, relays and WebRTC in memory, counted work.
 *
 * The runner, its lines and senders run as they always do. tests/library/fuzz_network.py does the
 * same for Python, with more attackers.
 */

import assert from "node:assert/strict";

import {
  CONTEXTS, Refused, encodeBase64url, decodeBase64url,
} from "../connectoid.js";
import { concat, toUtf8 } from "../encoding.js";
import { isPrivateHost } from "../networks.js";
import { CHECK_EVERY_S } from "../pauses.js";
import { makeSdp } from "./harness.mjs";

export const RELAY = "https://relay.example.com/";
// A relay that lies; Alice has mailboxes there.
export const LIAR = "https://liar.example.net/";
const OWN = [RELAY, LIAR];
const ANSWER = "A".repeat(43);
const START_US = 1_800_000_000_000_000;
// Turns of the loop and of the thread pool after which nothing is under way.
const FENCES = 12;
// Reads of a mailbox in a round, and the one that finds nothing more.
const MAX_READS = 17;
// Of a second, until something has to be done.
const MAX_TURNS = 300;
const MAX_REPLY_CHARS = 512 * 1_024;
const NOT_FOUND = { ok: true, found: false };

// What everybody has done so far: when it stands still, all wait for time.
let done = 0;

/** Let all that is under way go on until it waits for time. */
async function settle() {
  let before = -1;
  for (let quiet = 0; quiet < FENCES; quiet += 1) {
    if (done !== before) quiet = 0;
    before = done;
    await crypto.subtle.digest("SHA-256", new Uint8Array());
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/** A clock that stands still while there is work, and timers on it. */
export class Time {
  constructor() {
    this.nowS = 0;
    this.timers = new Set();
  }

  now = () => ({ wallUs: START_US + Math.round(1e6 * this.nowS), monotonicS: this.nowS });

  sleep = (seconds, signal) => new Promise((resolve) => {
    done += 1;
    const timer = { atS: this.nowS + Math.max(seconds, 0) };
    timer.end = () => {
      this.timers.delete(timer);
      signal?.removeEventListener("abort", timer.end);
      resolve();
    };
    this.timers.add(timer);
    signal?.addEventListener("abort", timer.end);
    if (signal?.aborted) timer.end();
  });

  /** Let so many seconds go by, timer after timer. */
  async pass(seconds) {
    const untilS = this.nowS + seconds;
    for (;;) {
      await settle();
      const [first] = [...this.timers].sort((one, other) => one.atS - other.atS);
      if (!first || first.atS > untilS) break;
      this.nowS = Math.max(this.nowS, first.atS);
      first.end();
    }
    this.nowS = untilS;
  }

  /** Return what a promise brings, while time goes by; fail if it takes too much of it. */
  async during(promise, what) {
    let isDone = false;
    const ended = promise.finally(() => {
      isDone = true;
    });
    for (let turn = 0; turn < MAX_TURNS && !isDone; turn += 1) await this.pass(1);
    assert.ok(isDone, `${what}: not within ${MAX_TURNS} s`);
    return ended;
  }
}

/** Stand in for cryptography, and count what would cost a millisecond. */
export class CountedSuite {
  constructor() {
    this.done = {};
    this.made = 0;
  }

  random(count) {
    this.made += 1;
    return digest(toUtf8(`random ${this.made}`), count);
  }

  async makeKey() {
    const pub = encodeBase64url(concat(Uint8Array.of(2), this.random(48)));
    return [pub, pub];
  }

  async check() {}

  async seal(pub, context, plaintext) {
    this._count("seal");
    return concat(digest(concat(toUtf8(pub), context), 32), this.random(16), plaintext);
  }

  async open(key, context, sealed) {
    const uses = new Map([[CONTEXTS.question, "question"], [CONTEXTS.message, "open"]]);
    this._count(uses.get(context) ?? "channel");
    const wanted = digest(concat(toUtf8(key), context), 32);
    if (wanted.some((octet, place) => octet !== sealed[place])) throw new Refused("seal");
    return sealed.slice(48);
  }

  async sign(key, octets) {
    this._count("sign");
    return digest(concat(toUtf8(key), octets), 96);
  }

  async verify(pub, signature, octets) {
    this._count("verify");
    const wanted = digest(concat(toUtf8(pub), octets), 96);
    if (encodeBase64url(wanted) !== encodeBase64url(signature)) throw new Refused("signature");
  }

  _count(what) {
    done += 1;
    this.done[what] = (this.done[what] ?? 0) + 1;
  }
}

/** Return so many octets that depend on all octets: FNV-1a, and no secret. */
function digest(octets, count) {
  let state = 0x811c9dc5;
  const mix = (octet) => {
    state = Math.imul(state ^ octet, 0x01000193) >>> 0;
    return (state ^ (state >>> 15)) & 0xff;
  };
  octets.forEach(mix);
  return Uint8Array.from({ length: count }, (_, place) => mix(place));
}

/** Relays in memory: an honest one, one that lies, and whomever others name. */
export class Network {
  constructor(time) {
    this.boxes = new Map();
    // What the liar says first, as JSON or any text.
    this.lies = [];
    // Replies with a hundred messages more that it still makes up for whoever asks.
    this.endless = 0;
    // Messages that relays have given out, and the distinct ones that strangers got, by URL.
    this.given = 0;
    this.questions = 0;
    this.strangers = new Map();
    this.underWay = 0;
    this.faults = [];
    this._time = time;
    this._at = 0;
    this._checked = new Map();
    this._reads = new Map();
    this._arrived = new AbortController();
  }

  put(pub, data) {
    this._at += 1;
    this.boxes.set(pub, [...(this.boxes.get(pub) ?? []), { at: this._at, data }]);
    this.wake();
  }

  /** Wake those who wait at a relay. */
  wake() {
    this._arrived.abort();
    this._arrived = new AbortController();
  }

  fetch = async (url, { method = "GET", body, signal }) => {
    this.underWay += 1;
    done += 1;
    try {
      return new Response(await this._answer(url, method, body, signal));
    } catch (error) {
      if (error instanceof assert.AssertionError) this.faults.push(error);
      throw error;
    } finally {
      this.underWay -= 1;
    }
  };

  async _answer(url, method, body, signal) {
    if (!OWN.includes(url)) return this._askStranger(url, method, body);
    if (method === "GET") return '{"ok": true}';
    const request = JSON.parse(body);
    const isLiar = url === LIAR;
    if (Array.isArray(request)) {
      this._countCheck(url, request);
      await this._wait(request, isLiar, signal);
    }
    if (request.action === "receive") this._countRead(request.pub);
    if (isLiar && this.lies.length) return this._lie();
    return JSON.stringify(this._say(request, isLiar));
  }

  _say(request, isLiar) {
    if (Array.isArray(request)) return request.map((check) => this._check(check, isLiar));
    if (request.action === "receive") return this._receive(request, isLiar);
    this.put(request.pub, request.data);
    return { ok: true };
  }

  _askStranger(url, method, body) {
    const { protocol, hostname } = new URL(url);
    assert.equal(method, "POST");
    assert.equal(protocol, "https:");
    assert.ok(!isPrivateHost(hostname), url);
    const { pub, ext, action, data, ...more } = JSON.parse(body);
    assert.deepEqual([typeof pub, action, more], ["string", "send", {}]);
    assert.notEqual(ext, undefined);
    this.strangers.set(url, (this.strangers.get(url) ?? new Set()).add(data));
    return '{"ok": true}';
  }

  async _wait(checks, isLiar, signal) {
    const untilS = this._time.nowS + checks[0].wait;
    const isQuiet = () => !checks.some((check) => this._newer(check).length)
      && !(isLiar && (this.lies.length || this.endless));
    while (isQuiet() && this._time.nowS < untilS) {
      const ends = AbortSignal.any([signal, this._arrived.signal]);
      await this._time.sleep(untilS - this._time.nowS, ends);
      signal.throwIfAborted();
    }
  }

  /** Fail for checks that begin too soon after those before (CHECK-8). */
  _countCheck(url, checks) {
    const { nowS } = this._time;
    const key = `${url} ${checks[0].pub}`;
    const lastS = this._checked.get(key) ?? -Infinity;
    assert.ok(nowS - lastS > CHECK_EVERY_S - 1e-6, `${url} is checked after ${nowS - lastS} s`);
    this._checked.set(key, nowS);
    for (const { pub } of checks) this._reads.set(pub, 0);
  }

  /** Fail for a mailbox that is read again and again after one check. */
  _countRead(pub) {
    this._reads.set(pub, this._reads.get(pub) + 1);
    assert.ok(this._reads.get(pub) <= MAX_READS, "a mailbox is read without end");
  }

  _lie() {
    const lie = this.lies.shift();
    this.given += lie.split('"data"').length - 1;
    this.questions += lie.split('"found"').length - 1;
    return lie;
  }

  _newer({ pub, at: after }) {
    return (this.boxes.get(pub) ?? []).filter(({ at }) => at > after);
  }

  _check(check, isLiar) {
    if (!this._newer(check).length && !(isLiar && this.endless)) return NOT_FOUND;
    this.questions += 1;
    return { ok: true, found: true, question: questionFor(check.pub) };
  }

  _receive({ pub, at, limit }, isLiar) {
    let messages = upTo(MAX_REPLY_CHARS, this._newer({ pub, at }).slice(0, limit));
    if (isLiar && this.endless) {
      this.endless -= 1;
      messages = Array.from({ length: limit }, (_, place) => (
        { at: at + place + 1, data: `QUJD${String(at + place).padStart(12, "0")}` }));
    }
    this.given += messages.length;
    return messages.length ? { ok: true, messages } : NOT_FOUND;
  }
}

/** Return so many messages as have no more characters, but always one. */
function upTo(maxChars, messages) {
  let chars = 0;
  return messages.filter(({ data }, place) => {
    chars += data.length;
    return !place || chars <= maxChars;
  });
}

/** Return a question that the owner of a mailbox can open. */
export function questionFor(pub) {
  const head = digest(concat(toUtf8(pub), CONTEXTS.question), 32);
  return encodeBase64url(concat(head, new Uint8Array(16), toUtf8(ANSWER)));
}

/** Return what is sealed in `data`, whoever it is for. */
export function peek(data) {
  return decodeBase64url(data).slice(48);
}

/** WebRTC in memory: an SDP has a name in a book, and whoever joins is connected. */
export class Wires {
  constructor() {
    this.ends = new Map();
    this.gathered = 0;
  }

  adapter() {
    return new PlayedPeers(this);
  }
}

/** The WebRTC of one app. It fails for an SDP that WebRTC must not see. */
class PlayedPeers {
  constructor(wires) {
    this._wires = wires;
    this.attempts = new Map();
    this.gathered = 0;
    this.faults = [];
  }

  start(report) {
    this.report = report;
  }

  gather(contact, attemptId, offer) {
    this.gathered += 1;
    this._wires.gathered += 1;
    this.attempts.set(contact, attemptId);
    const name = `end${this._wires.gathered}`;
    const end = { peers: this, contact, attemptId, other: null };
    this._wires.ends.set(name, end);
    if (offer) {
      this._judge(offer, "offer");
      end.other = this._wires.ends.get(nameIn(offer)) ?? null;
    }
    const sdp = makeSdp(offer ? "answer" : "offer", name);
    queueMicrotask(() => this.report(contact, "gathered", attemptId, sdp));
  }

  join(contact, attemptId, answer) {
    this._judge(answer, "answer");
    const theirs = this._wires.ends.get(nameIn(answer));
    const mine = theirs?.other;
    if (mine?.peers !== this || mine.attemptId !== attemptId) return;
    mine.other = theirs;
    for (const end of [mine, theirs]) tell(end, "opened");
  }

  async write(contact, attemptId, message) {
    const all = [...this._wires.ends.values()];
    const mine = all.find((end) => (
      end.peers === this && end.contact === contact && end.attemptId === attemptId));
    if (mine?.other) tell(mine.other, "message", message);
  }

  close() {}

  stop() {}

  _judge({ type, sdp }, wanted) {
    const sections = sdp.split("\r\n").filter((line) => line.startsWith("m="));
    const candidates = sdp.split("a=candidate:").length - 1;
    const isGood = type === wanted && sections.length === 1 && candidates <= 32
      && sections[0].startsWith("m=application ");
    if (!isGood) this.faults.push(sdp);
  }
}

function tell({ peers, contact, attemptId }, event, value) {
  queueMicrotask(() => peers.report(contact, event, attemptId, value));
}

function nameIn({ sdp }) {
  return /^s=(.*)\r$/m.exec(sdp)?.[1];
}
