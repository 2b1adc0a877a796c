/**
 * What a hostile contact, readers of a link and a relay that lies do to a real runner stays in
 * bounds, and an honest contact gets through. The seed says who does what.
 */

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  Connectoid, ConnectoidError, encodeBase64url, prove, readJws, readLink, sealMessage, signJws,
} from "../connectoid.js";
import { fromAscii, toUtf8 } from "../encoding.js";
import { MAX_SEEN, MAX_SEQ } from "../limits.js";
import { MEMBERS } from "../messages.js";
import { MAX_NEW_RELAYS } from "../sender.js";
import {
  CountedSuite, LIAR, Network, RELAY, Time, Wires, peek, questionFor,
} from "./fuzz_network.mjs";
import { MemoryStore, makeSdp } from "./harness.mjs";

const APP = "https://app.example.com/";
const SEEDS = 6;
const ACTS = 60;
// Sends of one mailbox each: an address has three.
const MAX_MAILBOXES = 3;
// Each is a contact, or the runner itself.
const CONTACTS = 4;
const ROUNDS = 60;
// A mailbox that brings more than 64 rests.
const BURST = 60;

const URLS = [
  (name) => `https://${name}.example/`, (name) => `https://${name}.example:8443/a`,
  (name) => `http://${name}.example/`, () => "https://[1]/", () => "https://127.0.0.1:9/",
  () => "http://localhost/", () => RELAY, (name) => `https://u@${name}.example/`,
  (name) => `https://${name}.example/..`, () => "https://[::1]/",
  (name) => `ftp://${name}.example/`,
];
const EXTRA_LINES = [
  "m=video 9 UDP/TLS/RTP/SAVPF 96", "a=candidate:1 1 udp 1 192.0.2.1 9 typ host", "a=\u2028",
  "a=candidate:1 1 udp 1 evil.example 9 typ host", "m=audio 9 UDP/TLS/RTP/SAVPF 111", "v=0", "",
];
const VALUES = [
  null, "", "A".repeat(43), 0, -1, 1.5, true, MAX_SEQ - 1, MAX_SEQ, 1e300, [], {}, [1, 2], "\ud800",
  "x".repeat(5_000), { type: "offer" }, "hello", "~",
];
const LIES = [
  "", "{", "null", "[]", "{}", '{"ok": true}', '[{"ok": true, "found": true}]', "[".repeat(5_000),
  '{"ok": false, "error": "Busy", "retry": 900}', '{"ok": false, "retry": -1}',
  '[{"ok": true, "found": true, "question": "QUJD"}]',
  '{"ok": true, "messages": [{"at": 9007199254740991, "data": ""}]}',
];
const PAUSES_S = [0, 2, 5, 21, 61, 601, 3_700];

/** Draw the same numbers for the same seed: mulberry32. */
class Chance {
  constructor(seed) {
    this._state = seed;
  }

  number(below) {
    this._state = (this._state + 0x6d2b79f5) | 0;
    let mixed = Math.imul(this._state ^ (this._state >>> 15), 1 | this._state);
    mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
    return ((mixed ^ (mixed >>> 14)) >>> 0) % below;
  }

  pick(choices) {
    return choices[this.number(choices.length)];
  }
}

/** Alice's app, and all who have something against it. */
class Stage {
  constructor(seed) {
    this.chance = new Chance(seed);
    this.time = new Time();
    this.network = new Network(this.time);
    this.wires = new Wires();
    this.problems = [];
    this.told = 0;
    this.suite = new CountedSuite();
    this.forger = new CountedSuite();
    this.forger.made = 1_000_000;
    this.peers = this.wires.adapter();
    this.alice = this._app(this.peers, this.suite);
    this.named = 0;
    this.seq = 0;
  }

  _app(webrtc, suite) {
    const { fetch } = this.network;
    const { now, sleep } = this.time;
    return new Connectoid(new MemoryStore(), [[RELAY, null]], {
      webrtc, suite, fetch, now, sleep, page: {},
      onProblem: (error) => this.problems.push(error),
      onEvent: () => {
        this.told += 1;
      },
    });
  }

  /** Have three contacts: Mallory, who is paired; a link that all read; and one at the liar. */
  async begin() {
    await this.alice.start();
    this.link = readLink(await this._share("Eve"));
    this.alice.relays = [[LIAR, null]];
    await this._share("Carol");
    this.alice.relays = [[RELAY, null]];
    this.mallory = await this._befriend(readLink(await this._share("Mallory")));
    this.suite.done = {};
    this.network.given = 0;
    this.network.questions = 0;
  }

  _share(name) {
    return this.time.during(this.alice.share(name, APP), `share ${name}`);
  }

  /** Pair by hand, and return the attacker's keys. */
  async _befriend(link) {
    const [key] = await this.forger.makeKey();
    const [box] = await this.forger.makeKey();
    const connectoid = `${box}.${encodeBase64url(toUtf8(RELAY))}`;
    const self = { key, connectoid, to: link.address };
    await this._post(await this._hello(link, key, connectoid), link.address);
    while (!this.network.boxes.has(box)) await this.time.pass(2);
    const [{ data }] = this.network.boxes.get(box);
    const octets = peek(data);
    const end = 4 + new DataView(octets.buffer).getUint32(0);
    const { payload, hash } = await readJws(fromAscii(octets.slice(4, end)));
    self.to = payload.connectoid;
    const ready = { ...this._payload(self, "ready"), re: hash };
    await this._post(await signJws(this.forger, key, ready), self.to);
    await this.time.pass(10);
    assert.equal(this._record("Mallory").state, "paired");
    return self;
  }

  _payload({ key, connectoid, to }, type) {
    this.seq += 1;
    const seq = this.time.now().wallUs + this.seq;
    return {
      type, to, from: key, seq, re: null, connectoid, r: "A".repeat(22), nonce: "A".repeat(22),
      sdpOffer: makeSdp("offer"), sdpAnswer: makeSdp("answer"),
    };
  }

  async _hello(link, key, connectoid) {
    const nonce = encodeBase64url(this.forger.random(16));
    const hello = { ...this._payload({ key, connectoid, to: link.address }, "hello"), nonce };
    return this._proven(link, await signJws(this.forger, key, hello));
  }

  async _proven({ secret }, jws) {
    return `${jws}.${await prove(secret, jws)}`;
  }

  async _post(text, address) {
    const [pub] = address.split(".");
    this.network.put(pub, await sealMessage(this.forger, pub, text));
  }

  _record(name) {
    return this.alice.contacts().find((record) => record.name === name);
  }

  // -- What others do ----------------------------------------------------------------------

  /** Return an address: one's own, or a new one that is good or not. */
  _address(own) {
    if (this.chance.number(2)) return own;
    this.named += 1;
    const url = this.chance.pick(URLS)(`m${this.named}`);
    return `${this.mallory.key}.${encodeBase64url(toUtf8(url))}`;
  }

  _sdp(type) {
    const sdp = makeSdp(type);
    if (this.chance.number(3)) return sdp;
    const extra = `${this.chance.pick(EXTRA_LINES)}\r\n`.repeat(this.chance.pick([1, 33, 200]));
    return { ...sdp, sdp: sdp.sdp + extra };
  }

  _damage(payload) {
    if (this.chance.number(6)) return payload;
    return { ...payload, [this.chance.pick(Object.keys(payload))]: this.chance.pick(VALUES) };
  }

  /** Send an offer of Mallory's with some members of its own, and let it be read. */
  async offer(members = {}) {
    const payload = { ...this._payload(this.mallory, "offer"), ...members };
    await this._post(await signJws(this.forger, this.mallory.key, payload), this.mallory.to);
    await this.time.pass(2);
  }

  async say() {
    const payload = this._damage({
      ...this._payload(this.mallory, this.chance.pick(Object.keys(MEMBERS))),
      connectoid: this._address(this.mallory.connectoid),
      sdpOffer: this._sdp("offer"),
    });
    await this._tryPost(this.mallory.key, payload, this.mallory.to);
  }

  async sayHello() {
    const key = encodeBase64url(Uint8Array.from({ length: 49 }, () => 3 + this.chance.number(2)));
    const payload = this._damage({
      ...this._payload({ ...this.mallory, key, to: this.link.address }, "hello"),
      connectoid: this._address(this.mallory.connectoid),
    });
    await this._tryPost(key, payload, this.link.address, this.link);
  }

  /** Sign and send; what is no text, or fits in no message, is not sent. */
  async _tryPost(key, payload, to, link) {
    for (let times = this.chance.pick([1, 1, 1, 20]); times > 0; times -= 1) {
      try {
        const jws = await signJws(this.forger, key, { ...payload, times });
        await this._post(link ? await this._proven(link, jws) : jws, to);
      } catch (error) {
        if (!(error instanceof ConnectoidError || error instanceof RangeError)) throw error;
      }
    }
  }

  bringJunk() {
    const [pub] = this.chance.pick([this.link.address, this.mallory.to]).split(".");
    for (let times = this.chance.pick([1, 70]); times > 0; times -= 1) {
      this.network.put(pub, encodeBase64url(this.forger.random(1 + this.chance.number(90))));
    }
  }

  lie() {
    this.network.lies.push(this.chance.pick(LIES));
    this.network.wake();
  }

  lieWithoutEnd() {
    const [pub] = this._record("Carol").invited.address.split(".");
    this.network.lies.push(JSON.stringify([{ ok: true, found: true, question: questionFor(pub) }]));
    this.network.endless = 20;
    this.network.wake();
  }

  report() {
    const attempts = [...this.peers.attempts];
    if (!attempts.length) return;
    const [number, attemptId] = this.chance.pick(attempts);
    const event = this.chance.pick(["opened", "message", "closed"]);
    const value = this.chance.pick([new Uint8Array(), "", new Uint8Array(65_537), "x".repeat(9)]);
    for (let times = this.chance.pick([1, 1, 50]); times > 0; times -= 1) {
      this.peers.report(number, event, attemptId - this.chance.number(2), value);
    }
  }

  wait() {
    return this.time.pass(this.chance.pick(PAUSES_S));
  }

  async act() {
    const acts = ["say", "say", "say", "sayHello", "bringJunk", "lie", "lieWithoutEnd", "report"];
    for (let turn = 0; turn < ACTS; turn += 1) {
      await this[this.chance.pick([...acts, "wait", "wait"])]();
    }
    await this.time.pass(10);
  }

  // -- The bounds --------------------------------------------------------------------------

  judge() {
    const { network, suite, peers } = this;
    assert.deepEqual([network.faults, peers.faults], [[], []]);
    const isFault = (error) => !(error instanceof ConnectoidError) || /failed/.test(error.message);
    assert.deepEqual(this.problems.filter(isFault), []);
    // What the runner does by itself, and a reply to each message.
    const replies = network.given + CONTACTS * (2 + this.time.nowS / 20);
    const { open = 0, question = 0, verify = 0, sign = 0, seal = 0 } = suite.done;
    assert.ok(open <= network.given, `${open} opened of ${network.given}`);
    assert.ok(question <= network.questions, `${question} questions of ${network.questions}`);
    // A renewal has a proof besides, for one of two keys.
    assert.ok(verify <= 3 * network.given, `${verify} verified of ${network.given}`);
    assert.ok(sign <= replies, `${sign} signed`);
    assert.ok(seal <= MAX_MAILBOXES * replies, `${seal} sealed`);
    assert.ok(peers.gathered <= replies, `${peers.gathered} connections`);
    assert.ok(this.told <= 2 * replies, `${this.told} events`);
    this._judgeMemory();
  }

  _judgeMemory() {
    const { network, time } = this;
    // Of Mallory, and of strangers with the link: a few at once, then one a minute of each.
    const most = 2 * (MAX_NEW_RELAYS + time.nowS / 60);
    assert.ok(network.strangers.size <= most, `${network.strangers.size} relays of others`);
    const busy = 2 * CONTACTS + network.strangers.size;
    assert.ok(network.underWay <= busy, `${network.underWay} requests`);
    assert.ok(time.timers.size <= 4 * busy, `${time.timers.size} timers`);
    for (const { contact } of this.alice.roster.all()) {
      assert.ok(contact.machine.seen.size <= MAX_SEEN, `${contact.machine.seen.size} digests`);
    }
  }

  /** Let Bob open a link now: he has to come through. */
  async pairWithBob() {
    const bob = this._app(this.wires.adapter(), this.forger);
    await bob.start();
    await this.time.during(bob.open(await this._share("Bob"), "Alice"), "open");
    for (let round = 0; round < ROUNDS; round += 1) {
      await this.time.pass(2);
      if (bob.contacts()[0].state === "paired" && this._record("Bob").state === "paired") break;
    }
    assert.deepEqual([bob.contacts()[0].state, this._record("Bob").state], ["paired", "paired"]);
    await this.end(bob);
  }

  end(app) {
    return this.time.during(app.close(), "close");
  }
}

/** Have a runner, let others do something, and judge. */
async function play(seed, act) {
  const stage = new Stage(seed);
  await stage.begin();
  await act(stage);
  stage.judge();
  await stage.pairWithBob();
  await stage.end(stage.alice);
  await stage.time.pass(100);
  assert.equal(stage.network.underWay, 0);
}

for (let seed = 1; seed <= SEEDS; seed += 1) {
  test(`what others do to a runner stays in bounds, with seed ${seed}`, () => (
    play(seed, (stage) => stage.act())));
}

test("no odd line of an offer reaches WebRTC", () => play(1, async (stage) => {
  await stage.offer();
  for (const line of EXTRA_LINES) {
    const sdp = makeSdp("offer");
    await stage.offer({ sdpOffer: { ...sdp, sdp: `${sdp.sdp}${line}\r\n` } });
  }
  assert.ok(stage.peers.gathered >= 1);
}));

test("of ever new relays few are asked, and no odd ones", () => play(1, async (stage) => {
  for (const url of [...URLS, ...Array(20).fill(URLS[0])]) {
    stage.named += 1;
    const octets = toUtf8(url(`m${stage.named}`));
    await stage.offer({ connectoid: `${stage.mallory.key}.${encodeBase64url(octets)}` });
  }
  assert.ok(stage.network.strangers.size >= MAX_NEW_RELAYS / 2);
}));

test("a burst of messages costs one opening and one check of each", () => play(1, async (stage) => {
  const [pub] = stage.mallory.to.split(".");
  const burst = [];
  for (let count = 0; count < BURST; count += 1) {
    const payload = stage._payload(stage.mallory, "offer");
    const jws = await signJws(stage.forger, stage.mallory.key, payload);
    burst.push(await sealMessage(stage.forger, pub, jws));
  }
  for (const data of burst) stage.network.put(pub, data);
  await stage.time.pass(10);
  const { open, verify, sign } = stage.suite.done;
  assert.deepEqual([open, verify, sign], [BURST, BURST, 1]);
}));
