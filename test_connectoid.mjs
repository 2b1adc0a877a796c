// Tests of connectoid.js: `node --test`. What needs a browser is in test_browser.py.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { cp, mkdir, mkdtemp, readFile, rm, symlink, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import net from "node:net";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { after, before, test } from "node:test";

import {
  CONNECTING, CONTEXTS, Connectoid, Contact, EMOJI, LinkError, NotConnectedError, PAIRING, RecordError,
  RelayClient, RelayError, StoreError, SystemSuite, UsageError, checkKept, decodeBase64url, decompress, encodeBase64url, parseAddress, readLink,
  readMailboxes,
} from "./connectoid.js";
import { checks, importKey } from "./vector_checks.mjs";

const PYTHON = process.env.PYTHON ?? new URL(".venv/bin/python", import.meta.url).pathname;
const RELAYS = [["http://127.0.0.1:9/", null]]; // where nobody is asked
const SUITE = new SystemSuite();
const here = (name) => new URL(name, import.meta.url).pathname;

// ---------------------------------------------------------------------------------------
// Vectors.
// ---------------------------------------------------------------------------------------

const load = async (name) => JSON.parse(await readFile(here(`vectors/${name}.json`), "utf8"));

for (const [name, check] of await checks(load)) test(`vector ${name}`, check);

// ---------------------------------------------------------------------------------------
// The suite.
// ---------------------------------------------------------------------------------------

test("points are decompressed where the engine does not", async () => {
  const { cases } = await load("connectoid_keys");
  const point = { name: "ECDH", namedCurve: "P-384" };
  for (const { pub, private: scalar } of cases.filter((each) => each.private)) {
    const { publicKey } = await importKey(scalar);
    const raw = new Uint8Array(await crypto.subtle.exportKey("raw", publicKey));
    assert.deepEqual(decompress(decodeBase64url(pub)), raw);
  }
  const subtle = new Proxy(crypto.subtle, { get: (target, name) => (name === "importKey"
    ? async (format, octets, ...rest) => {
      if (format === "raw" && rest[0].name === point.name && octets.length === 49) throw new Error("not here");
      return target.importKey(format, octets, ...rest);
    } : target[name].bind(target)) });
  const old = new SystemSuite({ subtle, getRandomValues: (octets) => crypto.getRandomValues(octets) });
  const [key, pub] = await SUITE.makeKey("ECDH");
  const sealed = await old.seal(pub, Uint8Array.of(1), Uint8Array.of(2));
  assert.deepEqual(await SUITE.open(key, Uint8Array.of(1), sealed), Uint8Array.of(2));
  for (const { pub, refused } of cases.filter((each) => each.refused)) {
    await assert.rejects(old.check(pub), { reason: refused });
    if (/^A[g-z0-9_-].{64}$/.test(pub)) assert.throws(() => decompress(decodeBase64url(pub)), `${pub}`);
  }
});

test("private keys cannot be taken out", async () => {
  for (const use of ["ECDH", "ECDSA"]) {
    const [{ privateKey }] = await SUITE.makeKey(use);
    await assert.rejects(crypto.subtle.exportKey("jwk", privateKey));
    await assert.rejects(crypto.subtle.exportKey("pkcs8", privateKey));
  }
});

test("a page without Web Crypto is told what to do", () => {
  assert.throws(() => new SystemSuite({}), /over https/);
});

// ---------------------------------------------------------------------------------------
// Two machines on a fake wire.
// ---------------------------------------------------------------------------------------

/** A clock, the boxes of a relay, and data channels between two contacts. */
class Wire {
  constructor() {
    this.nowS = 1_000;
    this.boxes = new Map();
    this.contacts = {};
    this.told = [];
    this.saved = {};
    this.at = 0;
    this.written = []; // on data channels, in order
  }

  get now() {
    return { wallUs: 1_800_000_000_000_000 + Math.round(this.nowS * 1e6), monotonicS: this.nowS };
  }

  async do(name, effects) {
    const contact = this.contacts[name];
    for (const effect of await effects) {
      if (effect.do === "save") this.saved[name] = effect.kept;
      if (effect.do === "send") {
        const { pub } = effect.mailbox;
        this.boxes.set(pub, [...this.boxes.get(pub) ?? [], [++this.at, effect.data]]);
      }
      if (effect.do === "gather") {
        const sdp = { type: effect.offer ? "answer" : "offer", sdp: `of ${name}` };
        await this.do(name, contact.gathered(this.now, effect.ask, sdp));
      }
      if (effect.do === "join") this.open = true;
      if (effect.do === "tell") this.told.push([name, effect.event]);
      if (effect.do === "write") this.written.push([name === "Alice" ? "Bob" : "Alice", effect.octets]);
    }
  }

  async poll(name) {
    const contact = this.contacts[name];
    const boxes = new Map(contact.polls(this.now, RELAYS[0][0]).map(({ mailbox: { pub }, at }) => (
      [pub, (this.boxes.get(pub) ?? []).filter(([when]) => when > at)])));
    await this.do(name, contact.polled(this.now, boxes));
  }

  async round() {
    for (const name of Object.keys(this.contacts)) {
      await this.poll(name);
      await this.do(name, this.contacts[name].tick(this.now));
    }
    if (this.open) {
      this.open = false;
      for (const [name, contact] of Object.entries(this.contacts)) {
        await this.do(name, contact.channelOpened(this.now, contact.attempt.ask));
      }
    }
    for (let next = this.written.shift(); next; next = this.written.shift()) {
      const contact = this.contacts[next[0]];
      await this.do(next[0], contact.channelMessage(this.now, contact.attempt.ask, next[1]));
    }
    this.nowS += 2;
  }
}

async function pair(wire) {
  const [alice, first] = await Contact.invite(SUITE, wire.now, "Bob", RELAYS);
  wire.contacts.Alice = alice;
  await wire.do("Alice", first);
  await wire.poll("Alice");
  const [bob, then] = await Contact.open(SUITE, wire.now, "Alice", readLink(alice.kept.invitation));
  wire.contacts.Bob = bob;
  await wire.do("Bob", then);
  return { alice, bob };
}

test("two contacts pair, connect, reconnect and part", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  for (let turn = 0; turn < 4; turn += 1) await wire.round();
  assert.deepEqual([alice.kept.state, bob.kept.state], ["paired", "paired"]);
  assert.deepEqual([alice.attempt.state, bob.attempt.state], ["connected", "connected"]);
  assert.deepEqual(alice.kept.comparison, bob.kept.comparison);
  assert.equal(alice.kept.comparison.length, 7);
  for (const [name, contact] of Object.entries(wire.contacts)) {
    assert.equal(wire.saved[name], contact.kept, "what is known is saved");
    await wire.do(name, contact.channelClosed(wire.now, contact.attempt.ask));
    assert.equal(contact.attempt.state, "apart");
  }
  await wire.do("Alice", alice.connect(wire.now));
  for (let turn = 0; turn < 4; turn += 1) await wire.round();
  assert.deepEqual([alice.attempt.state, bob.attempt.state], ["connected", "connected"]);
  await wire.do("Bob", bob.unshare(wire.now));
  await wire.round();
  assert.deepEqual([alice.kept.state, alice.kept.why, bob.kept.state], ["ended", "unshared", "unshared"]);
  assert.ok(wire.told.some(([name, event]) => name === "Alice" && event === "unshared"));
});

test("an answer to an offer that is not out is ignored", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  for (let turn = 0; turn < 4; turn += 1) await wire.round();
  for (const contact of [alice, bob]) await contact.disconnect(wire.now);
  await wire.do("Bob", bob.connect(wire.now));
  await wire.poll("Alice"); // she answers
  await bob.disconnect(wire.now);
  const [{ ask }] = await bob.connect(wire.now); // the next offer, before he sees the answer
  await bob.gathered(wire.now, ask, { type: "offer", sdp: "another" });
  await wire.poll("Bob");
  assert.equal(bob.attempt.state, "waiting");
});

test("after three attempts that no channel came of only one in 50 minutes is made", async () => {
  const wire = new Wire();
  const { bob } = await pair(wire);
  for (let turn = 0; turn < 4; turn += 1) await wire.round();
  await wire.do("Bob", bob.channelClosed(wire.now, bob.attempt.ask));
  wire.told.length = 0;
  await wire.do("Bob", bob.connect(wire.now));
  for (const endS = wire.nowS + 300; wire.nowS < endS; wire.nowS += 1) {
    wire.open = false; // whatever they agree on, nothing comes of it
    for (const name of ["Alice", "Bob"]) {
      await wire.poll(name);
      await wire.do(name, wire.contacts[name].tick(wire.now));
    }
  }
  const about = wire.told.filter(([name]) => name === "Bob");
  assert.deepEqual(about, [["Bob", "unreachable"]]);
});

test("events of one contact do not interleave", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  for (let turn = 0; turn < 4; turn += 1) await wire.round();
  const results = await Promise.all([alice.disconnect(wire.now), alice.connect(wire.now), alice.disconnect(wire.now),
    alice.connect(wire.now), alice.unshare(wire.now)]);
  const seqs = results.map((effects) => effects.find((effect) => effect.do === "save")?.kept.seq ?? 0).filter(Boolean);
  assert.deepEqual(seqs, [...new Set(seqs)].sort((one, other) => one - other));
  assert.deepEqual(results.map((effects) => effects[0].do), ["close", "save", "close", "save", "save"]);
  assert.equal(bob.attempt.state, "connected");
});

test("a step that fails changes nothing", async () => {
  const wire = new Wire();
  const { alice } = await pair(wire);
  const before = alice.kept;
  await assert.rejects(alice.verify(wire.now), UsageError);
  await assert.rejects(alice.move(wire.now, RELAYS), UsageError);
  assert.equal(alice.kept, before);
  const [bob] = await Contact.open(SUITE, wire.now, "Alice", readLink(before.invitation));
  const opened = bob.kept;
  await assert.rejects(bob.gathered(wire.now, 1, { type: "offer", sdp: "x".repeat(20_000) }), UsageError);
  assert.deepEqual([bob.kept === opened, bob.attempt.state], [true, "gathering"]);
  await assert.rejects(Contact.invite(SUITE, wire.now, "Bob", []), UsageError);
  const long = ["a", "b", "c"].map((name) => [`https://${name}.example.com/`, "x".repeat(1_000)]);
  await assert.rejects(Contact.invite(SUITE, wire.now, "Bob", long), /4096 characters/);
  await assert.rejects(Contact.invite(SUITE, wire.now, "Bob", [["https://a.example.com/", "\ud800"]]), UsageError);
  await assert.rejects(Contact.invite(SUITE, wire.now, "Bob", [["http://relay.example.com/", null]]), UsageError);
});

test("the tables are those of connectoid.py", async () => {
  const script = "import connectoid, json; print(json.dumps([[[r.state, r.event, list(r.then)] for r in t.values()]"
    + " for t in (connectoid.PAIRING, connectoid.CONNECTING)]))";
  const python = spawn(PYTHON, ["-c", script], { cwd: here(".") });
  let text = "";
  for await (const part of python.stdout) text += part;
  const rules = (table) => [...table.values()].map(({ state, event, then }) => [state, event, then]);
  assert.deepEqual([rules(PAIRING), rules(CONNECTING)], JSON.parse(text));
  for (const { does } of [...PAIRING.values(), ...CONNECTING.values()]) assert.ok(`_${does}` in Contact.prototype, does);
});

test("a damaged record is refused", () => {
  for (const record of [null, 1, "x", [], {}, { version: 1 }]) assert.throws(() => checkKept(record), RecordError);
  assert.throws(() => checkKept({ version: 2 }), /another version/);
});

// ---------------------------------------------------------------------------------------
// The client of a relay, against a relay that answers rubbish.
// ---------------------------------------------------------------------------------------

const closing = [];
after(() => Promise.all(closing.map((close) => close())));

/** Return the URL of a server that answers with a status and a body, and the requests that it gets. */
async function serve(answer) {
  const requests = [];
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const part of request) body += part;
    requests.push({ method: request.method, headers: request.headers, body });
    answer(response, body);
  });
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  closing.push(() => new Promise((resolve) => {
    server.closeAllConnections();
    server.close(resolve);
  }));
  return { url: `http://127.0.0.1:${server.address().port}/`, requests };
}

const RUBBISH = {
  "no JSON": (response) => response.end("<html>"),
  "a number": (response) => response.end("1"),
  nothing: (response) => response.end(),
  "not UTF-8": (response) => response.end(Buffer.from([0x22, 0xff, 0x22])),
  "over 1 MiB": (response) => response.end(JSON.stringify({ ok: true, x: "a".repeat(1_048_576) })),
  "a redirect": (response) => response.writeHead(307, { Location: "http://127.0.0.1:1/" }).end(),
  "an error": (response) => response.writeHead(400).end('{"ok":false,"error":"Bad request"}'),
  "ok that is no boolean": (response) => response.end('{"ok":1}'),
  "a cut connection": (response) => response.socket.destroy(),
};
for (const [name, answer] of Object.entries(RUBBISH)) {
  test(`relay that answers ${name} is a relay that failed`, async () => {
    const { url } = await serve(answer);
    await assert.rejects(new RelayClient(url).ask({ action: "check" }), RelayError);
  });
}

for (const [name, found] of Object.entries({
  "a list": [], "messages that are none": { ok: true, messages: "abc" }, "numbers": { ok: true, messages: [1] },
  "no data": { ok: true, messages: [{ at: 1 }] }, "at of no integer": { ok: true, messages: [{ at: true, data: "AA" }] },
  "at too large": { ok: true, messages: [{ at: 2 ** 53, data: "AA" }] },
})) {
  test(`relay that answers a receive with ${name} is a relay that failed`, async () => {
    const [key, pub] = await SUITE.makeKey("ECDH");
    const answer = encodeBase64url(await SUITE.seal(pub, CONTEXTS.question, new TextEncoder().encode("answer")));
    const { url } = await serve((response, body) => response.end(JSON.stringify(
      body.startsWith("[") ? [{ ok: true, found: true, question: answer }] : found)));
    const polls = [{ mailbox: { pub, url, ext: null }, key, at: 0 }];
    await assert.rejects(readMailboxes(SUITE, new RelayClient(url), polls, 0), RelayError);
  });
}

test("relay that does not answer is given up after ten seconds", async () => {
  const { url } = await serve(() => {});
  const slept = [];
  const sleep = async (seconds) => void slept.push(seconds);
  await assert.rejects(new RelayClient(url, { fetch, sleep }).ask({ action: "check" }), RelayError);
  await assert.rejects(new RelayClient(url, { fetch, sleep }).ask({ action: "check" }, 60), RelayError);
  assert.deepEqual(slept, [10, 70]);
});

test("retry of a relay is obeyed up to 15 minutes", async () => {
  for (const [said, obeyed] of [[7, 7], [10_000, 900], [-5, 0], ['"x"', 0], ["null", 0]]) {
    const reply = `{"ok":false,"error":"Too often","retry":${said}}`;
    const { url } = await serve((response) => response.writeHead(429).end(reply));
    await assert.rejects(new RelayClient(url).ask({}), (error) => error instanceof RelayError && error.retryS === obeyed);
  }
});

test("requests are simple ones, so that browsers ask no permission", async () => {
  const { url, requests } = await serve((response) => response.end('{"ok":true}'));
  await new RelayClient(url).ask({ action: "check" });
  assert.equal(requests[0].headers["content-type"], "text/plain");
  assert.equal(requests[0].body, '{"action":"check"}');
});

// ---------------------------------------------------------------------------------------
// Runners at a real relay. Connections are plain TCP, and the SDP says where to: what is
// tried is everything but WebRTC.
// ---------------------------------------------------------------------------------------

/** Keep contacts as long as the test runs. */
class MemoryStore {
  constructor() {
    this.records = new Map();
    this.last = 0;
  }

  async load() {
    return new Map(this.records);
  }

  async add(kept) {
    this.records.set(++this.last, kept);
    return this.last;
  }

  async save(number, kept) {
    this.records.set(number, kept);
  }

  async delete(number) {
    this.records.delete(number);
  }

  close() {}
}

class TcpAdapter {
  constructor() {
    this.sockets = new Map();
  }

  start(report) {
    this.report = report;
  }

  gather(contact, ask, offer) {
    if (offer) {
      this.serve(contact, ask, net.connect(Number(offer.sdp.split(" ")[1]), "127.0.0.1"));
      this.report(contact, "gathered", ask, { type: "answer", sdp: "here" });
      return;
    }
    const server = net.createServer({ pauseOnConnect: true }).listen(0, "127.0.0.1", () => (
      this.report(contact, "gathered", ask, { type: "offer", sdp: `port ${server.address().port}` })));
    server.unref();
    this.accepted = once(server, "connection").then(([socket]) => (server.close(), socket));
  }

  serve(contact, ask, socket) {
    this.sockets.set(contact, socket);
    let came = Buffer.alloc(0);
    const open = () => this.report(contact, "opened", ask);
    if (socket.readyState === "open") open();
    else socket.on("connect", open);
    socket.on("data", (octets) => {
      came = Buffer.concat([came, octets]);
      while (came.length >= 5 && came.length >= 5 + came.readUInt32BE()) {
        const message = came.subarray(5, 5 + came.readUInt32BE());
        this.report(contact, "message", ask, came[4] ? message.toString() : new Uint8Array(message));
        came = came.subarray(5 + message.length);
      }
    });
    socket.on("error", () => {});
    socket.on("close", () => this.report(contact, "closed", ask));
  }

  async join(contact, ask) {
    const socket = await this.accepted;
    this.serve(contact, ask, socket);
    socket.resume();
  }

  async write(contact, ask, message) {
    const octets = Buffer.from(message);
    const head = Buffer.alloc(5);
    head.writeUInt32BE(octets.length);
    head[4] = typeof message === "string" ? 1 : 0;
    this.sockets.get(contact).write(Buffer.concat([head, octets]));
  }

  close(contact) {
    this.sockets.get(contact)?.end();
  }

  stop() {
    for (const socket of this.sockets.values()) socket.end();
  }
}

/** Start a relay and return its URL. */
async function startRelay() {
  const flags = ["--host", "127.0.0.1", "--port", "0", "--db", ":memory:"];
  const relay = spawn(PYTHON, ["connectoid_relay.py", ...flags], { cwd: here(".") });
  closing.push(async () => {
    relay.kill();
    await once(relay, "exit");
  });
  const [line] = await once(createInterface({ input: relay.stderr }), "line");
  return `${/http:\S+/.exec(line)[0]}/`;
}

async function startApp(relay, options = {}) {
  const told = [];
  const app = new Connectoid(new MemoryStore(), [relay], { webrtc: new TcpAdapter(), onProblem: () => {},
    onEvent: (name, event) => told.push(event), ...options });
  await app.start();
  closing.push(() => app.close());
  return { app, told };
}

let relay = "";
before(async () => { relay = await startRelay(); });

test("two runners pair through a relay, connect and talk", async () => {
  const [{ app: alice, told }, { app: bob }] = [await startApp(relay), await startApp(relay)];
  const link = await alice.share("Bob", "https://app.example.com/#x");
  await bob.open(link, "Alice");
  await bob.open(link, "Alice again"); // goes on with the same contact
  const [hers, his] = await Promise.all([alice.connect("Bob", { timeoutS: 30 }), bob.connect("Alice", { timeoutS: 30 })]);
  await hers.send("hello");
  assert.equal(await his.receive(), "hello");
  for (let number = 0; number < 200; number += 1) await his.send(Uint8Array.of(number, 1));
  await his.send("end");
  for (let number = 0; number < 200; number += 1) assert.deepEqual(await hers.receive(), Uint8Array.of(number, 1));
  assert.equal(await hers.receive(), "end");
  assert.deepEqual(alice.contacts()[0].comparison, bob.contacts()[0].comparison);
  await his.close();
  await assert.rejects(hers.receive(), NotConnectedError);
  await bob.verify("Alice");
  assert.ok(bob.contacts()[0].verified);
  const other = await startRelay();
  await alice.move("Bob", [other]);
  await Promise.all([alice.connect("Bob", { timeoutS: 30 }), bob.connect("Alice", { timeoutS: 30 })]);
  assert.deepEqual(alice.contacts()[0].relays, [[other, null]]);
  assert.deepEqual(parseAddress(bob.contacts()[0].contactAddress, { allowHttp: true }).map(({ url }) => url), [other]);
  await bob.unshare("Alice");
  while (!told.includes("unshared")) await new Promise((resolve) => setTimeout(resolve, 20));
  assert.deepEqual(bob.contacts(), []);
  assert.equal(alice.contacts()[0].state, "ended");
  await assert.rejects(alice.connect("Bob"), NotConnectedError);
  await alice.share("Bob", "https://app.example.com/"); // in place of the one that ended
});

test("where WebRTC is missing, that is told, and contacts can be made and seen", async () => {
  const problems = [];
  const { app } = await startApp(relay, { webrtc: undefined, onProblem: ({ message }) => problems.push(message) });
  await app.share("Bob", "https://app.example.com/");
  assert.deepEqual(app.contacts().map(({ name, state }) => [name, state]), [["Bob", "invited"]]);
  assert.deepEqual(problems, ["WebRTC is missing or off here: contacts can be seen and ended, but not connected."]);
});

test("contacts go on after a restart", async () => {
  const [store, other] = [new MemoryStore(), await startApp(relay)];
  let app = new Connectoid(store, [relay], { webrtc: new TcpAdapter(), onProblem: () => {} });
  await app.start();
  const link = await app.share("Bob", "https://app.example.com/");
  await app.close();
  await other.app.open(link, "Alice");
  app = new Connectoid(store, [relay], { webrtc: new TcpAdapter(), onProblem: () => {} });
  closing.push(() => app.close());
  await app.start();
  const [hers, his] = await Promise.all([
    app.connect("Bob", { timeoutS: 30 }), other.app.connect("Alice", { timeoutS: 30 })]);
  await hers.send("there again");
  assert.equal(await his.receive(), "there again");
});

test("misuse of a runner is an error that says what to do", async () => {
  const { app } = await startApp(relay);
  const link = await app.share("Bob", "https://app.example.com/");
  await assert.rejects(app.share("Bob", "https://app.example.com/"), UsageError);
  await assert.rejects(app.share("", "https://app.example.com/"), UsageError);
  await assert.rejects(app.open(link, "Alice"), /your own link/);
  await assert.rejects(app.open("https://app.example.com/", "Alice"), LinkError);
  await assert.rejects(app.connect("Carol"), UsageError);
  await assert.rejects(app.verify("Bob"), UsageError);
  await assert.rejects(app.connect("Bob", { timeoutS: 0.05 }), /not there/);
});

test("what cannot be saved is not sent", async () => {
  const store = new MemoryStore();
  const { url, requests } = await serve((response) => response.end('{"ok":true}'));
  const app = new Connectoid(store, [url], { webrtc: new TcpAdapter(), onProblem: () => {} });
  closing.push(() => app.close());
  await app.start();
  await app.share("Bob", "https://app.example.com/");
  const before = app.contacts()[0];
  store.save = async () => { throw new StoreError("full"); };
  await assert.rejects(app.unshare("Bob"), StoreError);
  assert.deepEqual(app.contacts()[0], before);
  assert.ok(!requests.some(({ body }) => body.includes('"send"')));
});

/** Start a runner in a page of its own time, at a relay that is a function; `pass` lets seconds go by, one by one. */
async function startFaked(answer = (checks) => checks.map(() => ({ ok: true, found: false }))) {
  const requests = [];
  const sleeping = new Set();
  const page = new EventTarget();
  page.document = Object.assign(new EventTarget(), { visibilityState: "visible" });
  let monotonicS = 0;
  const options = {
    page,
    now: () => ({ wallUs: 1_800_000_000_000_000 + monotonicS * 1e6, monotonicS }),
    sleep: (seconds, signal) => new Promise((resolve) => {
      sleeping.add([monotonicS + Math.max(seconds, 0), resolve]);
      signal?.addEventListener("abort", () => resolve());
      if (signal?.aborted) resolve();
    }),
    async fetch(url, { body = null, ...init }) {
      const request = JSON.parse(body);
      requests.push({ atS: monotonicS, request, init });
      const reply = request ? await answer(request, monotonicS) : {};
      return new Response(typeof reply === "string" ? reply : JSON.stringify(reply));
    },
  };
  const { app, ...rest } = await startApp("https://relay.example.com/", options);
  const pass = async (seconds) => {
    for (const endS = monotonicS + seconds; monotonicS < endS; monotonicS += 1) {
      for (const entry of sleeping) if (entry[0] <= monotonicS) (sleeping.delete(entry), entry[1]());
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
  };
  return { app, pass, page, requests, ...rest };
}

test("requests carry nothing and follow nothing", async () => {
  const { app, requests, pass } = await startFaked();
  await app.share("Bob", "https://app.example.com/");
  await pass(5);
  for (const { init } of requests) {
    assert.deepEqual([init.redirect, init.credentials, init.cache, init.referrerPolicy],
      ["error", "omit", "no-store", "no-referrer"]);
  }
});

test("without contacts nothing is asked, and a hidden page asks once a minute without waiting", async () => {
  const { app, requests, pass, page } = await startFaked();
  await pass(300);
  assert.equal(requests.length, 0);
  page.document.visibilityState = "hidden";
  await app.share("Bob", "https://app.example.com/");
  await pass(100);
  requests.length = 0;
  await pass(600);
  assert.ok(requests.length === 9 || requests.length === 10, `${requests.length} in ten minutes`);
  assert.ok(requests.every(({ request }) => request[0].wait === 0));
  page.document.visibilityState = "visible";
  page.document.dispatchEvent(new Event("visibilitychange"));
  requests.length = 0;
  await pass(3);
  assert.equal(requests[0].request[0].wait, 60);
});

test("a page that is left asks nothing until it is shown again", async () => {
  const { app, requests, pass, page } = await startFaked();
  await app.share("Bob", "https://app.example.com/");
  await pass(5);
  page.dispatchEvent(new Event("pagehide"));
  await pass(5);
  requests.length = 0;
  await pass(300);
  assert.equal(requests.length, 0);
  page.dispatchEvent(new Event("pageshow"));
  await pass(3);
  assert.equal(requests.length, 1);
});

test("a relay that fails is asked ever more seldom, and at once when the network is back", async () => {
  const { app, requests, pass, page } = await startFaked(() => "rubbish");
  await app.share("Bob", "https://app.example.com/");
  await pass(400);
  const times = requests.filter(({ request }) => request).map(({ atS }) => atS);
  const gaps = times.slice(1).map((atS, place) => atS - times[place]);
  for (const [place, backoffS] of [2, 5, 15, 30, 60, 60].entries()) {
    assert.ok(gaps[place] >= backoffS && gaps[place] <= 1.25 * backoffS + 2, `${gaps}`);
  }
  requests.length = 0;
  page.dispatchEvent(new Event("online"));
  await pass(3);
  assert.equal(requests.length, 1);
});

test("a relay that says when to come again is obeyed", async () => {
  const { app, requests, pass } = await startFaked(
    (_, atS) => ({ ok: false, error: "Too often", retry: atS < 1 ? 200 : 5_000 }));
  await app.share("Bob", "https://app.example.com/");
  await pass(2_500);
  const times = requests.filter(({ request }) => request).map(({ atS }) => atS);
  assert.ok(times[1] - times[0] >= 200 && times[1] - times[0] <= 252, `${times}`);
  assert.ok(times[2] - times[1] >= 900 && times[2] - times[1] <= 1_127, `${times}`);
});

test("a message that is lost on its way to a relay is sent again", async () => {
  let failures = 3;
  const { app, requests, pass } = await startFaked((request) => {
    if (Array.isArray(request)) return request.map(() => ({ ok: true, found: false }));
    failures -= 1;
    return failures >= 0 ? "rubbish" : { ok: true };
  });
  const [{ kept }] = await Contact.invite(SUITE, { wallUs: 1, monotonicS: 1 }, "", [["https://relay.example.com/", null]]);
  app.webrtc.gather = (contact, ask) => app.webrtc.report(contact, "gathered", ask, { type: "offer", sdp: "x" });
  await app.open(kept.invitation, "Alice");
  await pass(90); // the machine sends the hello anew after 50
  const sent = requests.flatMap(({ request }) => (request?.action === "send" ? [request.data] : []));
  assert.equal(sent.filter((data) => data === sent[0]).length, 4);
});

// ---------------------------------------------------------------------------------------
// With connectoid.py on the other side.
// ---------------------------------------------------------------------------------------

/** Start cross_peer.py and return it, with `next(word)`: the rest of the next line that begins so. */
function startPeer(...args) {
  const peer = spawn(PYTHON, [here("cross_peer.py"), ...args], { stdio: ["pipe", "pipe", "inherit"] });
  closing.push(() => peer.kill());
  const lines = createInterface({ input: peer.stdout })[Symbol.asyncIterator]();
  const next = async (word) => {
    for (;;) {
      const { value, done } = await lines.next();
      if (done) throw new Error(`the peer ended before it said ${word}`);
      if (value.startsWith(word)) return value.slice(word.length + 1);
    }
  };
  return { peer, next };
}

for (const role of ["share", "open"]) {
  test(`a contact with connectoid.py that did ${role} pairs, connects, talks and parts`, async () => {
    const { app, told } = await startApp(relay);
    const link = role === "open" && await app.share("Bob", "https://app.example.com/");
    const { peer, next } = startPeer(role, relay, ...(link ? [link] : []));
    const name = link ? "Bob" : "Alice";
    if (!link) await app.open(await next("link"), name);
    const channel = await app.connect(name, { timeoutS: 40 });
    await channel.send("hello");
    assert.equal(await channel.receive(), "hello");
    await channel.send(Uint8Array.of(1, 2, 255));
    assert.deepEqual(await channel.receive(), Uint8Array.of(1, 2, 255));
    await channel.close();
    const { comparison } = app.contacts()[0];
    assert.equal(await next("emoji"), comparison.map((number) => EMOJI[number][1]).join(" "));
    assert.equal(await next("state"), "paired");
    peer.stdin.write("unshare\n");
    while (!told.includes("unshared")) await new Promise((resolve) => setTimeout(resolve, 20));
    peer.stdin.write("end\n");
    await once(peer, "exit");
  });
}

// ---------------------------------------------------------------------------------------
// Types: what the JSDoc says is checked, and is what a TypeScript program gets from npm.
// ---------------------------------------------------------------------------------------

const TSC = here("node_modules/typescript/bin/tsc");
const NPM = join(dirname(process.execPath), "../lib/node_modules/npm/bin/npm-cli.js"); // where Node brings it
const skip = [[TSC, "TypeScript is missing: npm install --ignore-scripts"], [NPM, "npm is not where Node brings it"]]
  .find(([path]) => !existsSync(path))?.[1] ?? false;

const CONSUMER = `import { Channel, Connectoid, ConnectoidError, Store } from "connectoid";
const app = new Connectoid(await Store.open(), ["https://relay.example.com/"], { onProblem: (error) => error.message });
const channel: Channel = await app.connect(await app.open("https://app.example.com/#connectoid=x", "Alice"));
for await (const message of channel) if (typeof message !== "string") message.byteLength satisfies number;
const { name, verified }: { name: string, verified: boolean } = app.contacts()[0];
`;
const MISTAKES = {
  "a relay that is a number": "new Connectoid(await Store.open(), [8080]);",
  "a link without a name": 'await app.open("https://app.example.com/");',
  "a message that is a number": "await channel.send(1);",
  "an error that is none of the library": "const error: ConnectoidError = new Date();",
};

/** Run a script of Node in a folder; return its exit status and what it said. */
async function run(cwd, ...args) {
  const child = spawn(process.execPath, args, { cwd });
  let text = "";
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (part) => { text += part; });
  const [status] = await once(child, "close");
  return { status, text };
}

test("the types are strict", { skip }, async () => {
  assert.deepEqual(await run(here("."), TSC, "--noEmit", "--checkJs", "--strict"), { status: 0, text: "" });
  const like = "--allowJs --target es2022 --lib es2024,dom,dom.iterable,dom.asynciterable --module nodenext".split(" ");
  const page = ["--ignoreConfig", "--noEmit", "--checkJs", "--strict", ...like, "examples/shopping_list/app.js"];
  assert.deepEqual(await run(here("."), TSC, ...page), { status: 0, text: "" });
});

test("a TypeScript program has the types of the package, and its mistakes are found", { skip }, async () => {
  const folder = await mkdtemp(join(tmpdir(), "connectoid-types-"));
  closing.push(() => rm(folder, { recursive: true }));
  const [made, program] = [join(folder, "package"), join(folder, "program")];
  await mkdir(join(program, "node_modules/connectoid"), { recursive: true });
  const files = ["connectoid.js", "package.json", "tsconfig.json", "PROTOCOL.md"];
  for (const name of files) await cp(here(name), join(made, name));
  await symlink(here("node_modules"), join(made, "node_modules"));
  const packed = await run(made, NPM, "pack", "--silent", "--offline"); // with what `prepare` writes
  assert.equal(packed.status, 0, packed.text);
  const archive = join(made, packed.text.trim().split("\n").at(-1));
  const place = ["--strip-components=1", "-C", join(program, "node_modules/connectoid")];
  await once(spawn("tar", ["-xzf", archive, ...place]), "close");
  const check = async (lines) => {
    await writeFile(join(program, "program.mts"), lines);
    return run(program, TSC, "--noEmit", "--strict", "--module", "nodenext", "--target", "es2022", "program.mts");
  };
  assert.deepEqual(await check(CONSUMER), { status: 0, text: "" });
  for (const [mistake, line] of Object.entries(MISTAKES)) {
    const { status, text } = await check(CONSUMER + line);
    assert.deepEqual([status !== 0, text.match(/error TS/g)?.length], [true, 1], `${mistake}: ${text}`);
    assert.match(text, /^program\.mts\(6,/, mistake);
  }
});
