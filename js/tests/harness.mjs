/** What the tests share: places, relays, stores, connections, and a wire between two machines. */

import { spawn } from "node:child_process";
import { once } from "node:events";
import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import net from "node:net";
import { createInterface } from "node:readline";
import { after } from "node:test";

import { Connectoid, Contact, SystemSuite, readLink } from "../connectoid.js";

export const SUITE = new SystemSuite();

/** Return a path from the top of the checkout. */
export const here = (name) => new URL(`../../${name}`, import.meta.url).pathname;
const PYTHON = process.env.PYTHON ?? here(".venv/bin/python");

/** Return a file of vectors. */
export async function load(name) {
  return JSON.parse(await readFile(here(`vectors/${name}.json`), "utf8"));
}

// Whatever happens, all of it is closed after the tests of a file.
export const closing = [];
after(() => Promise.all(closing.map((close) => close())));

/** Start Python; it ends with the tests. Throw an Error that says what to do if there is none. */
export async function startPython(args, options) {
  const child = spawn(PYTHON, args, options);
  const ended = new Promise((resolve) => {
    child.once("exit", resolve);
  });
  try {
    await once(child, "spawn");
  } catch (error) {
    const advice = "`make .venv/ready` makes it, and the variable PYTHON names another one";
    throw new Error(`${PYTHON} cannot be started (${error.code}): ${advice}`);
  }
  closing.push(() => {
    child.kill();
    return ended;
  });
  return child;
}

// ---------------------------------------------------------------------------------------
// Relays.
// ---------------------------------------------------------------------------------------

/** Return the URL of a server that answers as it is told, and the requests that it gets. */
export async function serve(answer) {
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

/** Start a relay, perhaps with more flags, and return its URL. */
export async function startRelay(...more) {
  const flags = ["--host", "127.0.0.1", "--port", "0", "--db", ":memory:", ...more];
  const relay = await startPython(["connectoid_relay.py", ...flags], { cwd: here(".") });
  const lines = createInterface({ input: relay.stderr });
  const ended = once(lines, "close").then(() => ["it ended"]);
  const [line] = await Promise.race([once(lines, "line"), ended]);
  const ready = /http:\S+/.exec(line);
  if (!ready) throw new Error(`no relay with ${PYTHON}: ${line}`);
  return `${ready[0]}/`;
}

// ---------------------------------------------------------------------------------------
// Runners. Their connections are plain TCP, and the SDP says where to.
// ---------------------------------------------------------------------------------------

/** Keep contacts as long as the test runs. */
export class MemoryStore {
  constructor() {
    this.records = new Map();
    this.refusals = new Map();
    this.last = 0;
  }

  async load() {
    return new Map(this.records);
  }

  async add(record) {
    this.last += 1;
    this.records.set(this.last, record);
    return this.last;
  }

  async save(number, record) {
    this.records.set(number, record);
  }

  async delete(number) {
    this.records.delete(number);
    this.refusals.delete(number);
  }

  async loadRefusals() {
    return new Map(this.refusals);
  }

  async saveRefusals(number, counts) {
    if (this.records.has(number)) this.refusals.set(number, { ...counts });
  }

  close() {}
}

/** Return an offer or answer that nobody's WebRTC has made, with a name in it. */
export function makeSdp(type, name = "-") {
  const lines = [
    "v=0",
    "o=- 1 1 IN IP4 0.0.0.0",
    `s=${name}`,
    "t=0 0",
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel",
    "c=IN IP4 0.0.0.0",
    "a=mid:0",
    "a=sctp-port:5000",
    "a=ice-ufrag:abcd",
    "a=ice-pwd:abcdefghijklmnopqrstuv",
    `a=fingerprint:sha-256 ${Array(32).fill("AB").join(":")}`,
    `a=setup:${type === "offer" ? "actpass" : "active"}`,
  ];
  return { type, sdp: lines.map((line) => `${line}\r\n`).join("") };
}

// The length of a message, and whether it is a string.
const HEADER_BYTES = 5;

/** Make connections over TCP: the offerer listens, and its SDP is the port. */
export class TcpAdapter {
  constructor() {
    this.sockets = new Map();
  }

  start(report) {
    this.report = report;
  }

  gather(contact, attemptId, offer) {
    if (offer) {
      const [, port] = offer.sdp.match(/^s=(\d+)\r$/m);
      this.serve(contact, attemptId, net.connect(Number(port), "127.0.0.1"));
      this.report(contact, "gathered", attemptId, makeSdp("answer"));
      return;
    }
    const server = net.createServer({ pauseOnConnect: true });
    server.listen(0, "127.0.0.1", () => {
      const sdp = makeSdp("offer", server.address().port);
      this.report(contact, "gathered", attemptId, sdp);
    });
    server.unref();
    this.accepted = once(server, "connection").then(([socket]) => {
      server.close();
      return socket;
    });
  }

  serve(contact, attemptId, socket) {
    this.sockets.set(contact, socket);
    const tell = (event, value) => this.report(contact, event, attemptId, value);
    if (socket.readyState === "open") tell("opened");
    else socket.on("connect", () => tell("opened"));
    let came = Buffer.alloc(0);
    socket.on("data", (octets) => {
      came = Buffer.concat([came, octets]);
      while (came.length >= HEADER_BYTES) {
        const end = HEADER_BYTES + came.readUInt32BE();
        if (came.length < end) return;
        const message = came.subarray(HEADER_BYTES, end);
        tell("message", came[4] ? message.toString() : new Uint8Array(message));
        came = came.subarray(end);
      }
    });
    socket.on("error", () => {});
    socket.on("close", () => tell("closed"));
  }

  async join(contact, attemptId) {
    const socket = await this.accepted;
    this.serve(contact, attemptId, socket);
    socket.resume();
  }

  async write(contact, attemptId, message) {
    const octets = Buffer.from(message);
    const head = Buffer.alloc(HEADER_BYTES);
    head.writeUInt32BE(octets.length);
    head[4] = Number(typeof message === "string");
    this.sockets.get(contact).write(Buffer.concat([head, octets]));
  }

  close(contact) {
    this.sockets.get(contact)?.end();
  }

  doubt() {}

  stop() {
    for (const socket of this.sockets.values()) socket.destroySoon();
    // Nobody may have joined it.
    this.accepted?.then((socket) => socket.destroySoon());
  }
}

/** Start a runner at a relay; return it, and the events that it tells. */
export async function startApp(relay, options = {}) {
  const told = [];
  const store = options.store ?? new MemoryStore();
  const app = new Connectoid(store, [relay], {
    webrtc: new TcpAdapter(),
    onProblem: () => {},
    onEvent: (name, event) => told.push(event),
    ...options,
  });
  await app.start();
  closing.push(() => app.close());
  return { app, told };
}

/** Wait until something is true. */
export async function until(isTrue) {
  while (!isTrue()) await new Promise((resolve) => setTimeout(resolve, 20));
}

// ---------------------------------------------------------------------------------------
// Two machines on a fake wire.
// ---------------------------------------------------------------------------------------

/** Relays where nobody is asked. */
export const RELAYS = [["http://127.0.0.1:9/", null]];

/** A clock, the boxes of a relay, and data channels between two contacts. */
export class Wire {
  constructor() {
    this.nowS = 1_000;
    this.boxes = new Map();
    this.contacts = {};
    this.told = [];
    this.saved = {};
    this.at = 0;
    // The relays of both.
    this.urls = [RELAYS[0][0]];
    // What a relay has taken is told.
    this.relayReplies = true;
    // On data channels, in order.
    this.written = [];
  }

  get now() {
    const wallUs = 1_800_000_000_000_000 + Math.round(this.nowS * 1e6);
    return { wallUs, monotonicS: this.nowS };
  }

  async do(name, effects) {
    for (const effect of await effects) await this.doOne(name, effect);
  }

  async doOne(name, effect) {
    if (effect.do === "save") this.saved[name] = effect.record;
    if (effect.do === "send") {
      this.deliver(effect);
      if (this.relayReplies) await this.contacts[name]?.sent(this.now, effect.hash);
    }
    if (effect.do === "gather") await this.gather(name, effect);
    if (effect.do === "join") this.open = true;
    if (effect.do === "tell") this.told.push([name, effect.event]);
    if (effect.do === "write") {
      const other = name === "Alice" ? "Bob" : "Alice";
      this.written.push([other, effect.octets]);
    }
  }

  deliver({ mailbox: { pub }, data }) {
    this.at += 1;
    const before = this.boxes.get(pub) ?? [];
    this.boxes.set(pub, [...before, [this.at, data]]);
  }

  async gather(name, { attemptId, offer }) {
    const sdp = makeSdp(offer ? "answer" : "offer", name);
    await this.do(name, this.contacts[name].gathered(this.now, attemptId, sdp));
  }

  async poll(name) {
    const contact = this.contacts[name];
    const boxes = new Map();
    const polls = this.urls.flatMap((url) => contact.polls(this.now, url));
    for (const { mailbox: { pub }, at: after } of polls) {
      const all = this.boxes.get(pub) ?? [];
      boxes.set(pub, all.filter(([at]) => at > after));
    }
    await this.do(name, contact.polled(this.now, boxes));
  }

  async round() {
    for (const [name, contact] of Object.entries(this.contacts)) {
      await this.poll(name);
      await this.do(name, contact.tick(this.now));
    }
    if (this.open) await this.openChannels();
    while (this.written.length) {
      const [name, octets] = this.written.shift();
      const contact = this.contacts[name];
      const { attemptId } = contact.attempt;
      await this.do(name, contact.channelMessage(this.now, attemptId, octets));
    }
    this.nowS += 2;
  }

  async rounds(count) {
    for (let turn = 0; turn < count; turn += 1) await this.round();
  }

  async openChannels() {
    this.open = false;
    for (const [name, contact] of Object.entries(this.contacts)) {
      await this.do(name, contact.channelOpened(this.now, contact.attempt.attemptId));
    }
  }
}

/** Let Alice share and Bob open a link. */
export async function pair(wire) {
  const [alice, invited] = await Contact.invite(SUITE, wire.now, "Bob", RELAYS);
  wire.contacts.Alice = alice;
  await wire.do("Alice", invited);
  await wire.poll("Alice");
  const invitation = readLink(alice.record.invitation);
  const [bob, opened] = await Contact.open(SUITE, wire.now, "Alice", invitation);
  wire.contacts.Bob = bob;
  await wire.do("Bob", opened);
  return { alice, bob };
}
