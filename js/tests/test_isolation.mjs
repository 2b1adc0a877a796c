/** What one contact or relay does costs the others nothing, and no more than a bounded amount. */

import assert from "node:assert/strict";
import { before, test } from "node:test";

import { Complaints } from "../complaints.js";
import {
  CONTEXTS, RelayClient, SystemSuite, encodeBase64url, parseAddress, prove, readLink, sealMessage,
  signJws,
} from "../connectoid.js";
import { Contact } from "../contact/contact.js";
import { Box } from "../contact/machine.js";
import { BURST_PER_S, MAX_BURST_MESSAGES, MAX_RELAY_MESSAGES } from "../limits.js";
import { Line, Lines, MAX_LINES, Places } from "../line.js";
import { Budget, MAX_BYTES, MAX_MESSAGES } from "../relay_client.js";
import {
  MAX_LETTERS, MAX_NEW_RELAYS, MAX_QUEUES, MAX_QUEUES_OF_CONTACT, MAX_QUEUES_OF_STRANGERS,
  NEW_RELAY_EVERY_S, Sender,
} from "../sender.js";
import { browserSystem } from "../system.js";
import {
  MemoryStore, SUITE, TcpAdapter, makeSdp, serve, startApp, startRelay, until,
} from "./harness.mjs";

const APP = "https://app.example.com/";
const utf8 = (text) => new TextEncoder().encode(text);
const SOON = { timeoutS: 120 };

let relay = "";
before(async () => {
  relay = await startRelay();
});

/** Answer as a relay without messages. */
function nothingNew(response, body) {
  const request = JSON.parse(body || "{}");
  const found = { ok: true, found: false };
  response.end(JSON.stringify(Array.isArray(request) ? request.map(() => found) : found));
}

/** Return what was sent to a server, and how often its document was asked for. */
function asked(requests) {
  const sent = requests.filter(({ body }) => body.includes('"send"'));
  return [sent.length, requests.filter(({ method }) => method === "GET").length];
}

/** Let Bob, whose only relay is a service on this machine, open Alice's link. */
async function lead(allowPrivateRelays, privacy = {}) {
  const { url, requests } = await serve(nothingNew);
  const problems = [];
  const onProblem = ({ message }) => problems.push(message);
  const { app: alice, told } = await startApp(relay, { onProblem, allowPrivateRelays });
  alice.privacy = privacy;
  const { app: bob } = await startApp(url, { allowPrivateRelays: true });
  await bob.open(await alice.share("Bob", APP), "Alice");
  await until(() => alice.contacts()[0].state === "welcomed");
  return { alice, told, requests, problems };
}

test("an opener leads an app to no port of its machine, and the user is told", async () => {
  const { requests, problems } = await lead(false);
  await until(() => problems.some((text) => text.includes("is no relay of yours")));
  // Bob himself asks for the document of his relay.
  assert.deepEqual(asked(requests), [0, 1]);
});

test("a private relay gets the protocol's POST where the user allows it", async () => {
  const { requests } = await lead(true);
  await until(() => asked(requests)[0] > 0);
  assert.equal(asked(requests)[1], 1);
});

test("an app that asks first is led nowhere before the user connects", async () => {
  const { alice, told, requests } = await lead(true, { askFirst: true });
  await until(() => told.includes("wants_to_connect"));
  assert.equal(asked(requests)[0], 0);
  await assert.rejects(alice.connect("Bob", { timeoutS: 0 }));
  await until(() => asked(requests)[0] > 0);
});

test("a link leads an app to no port of its machine unless the user names it", async () => {
  const problems = [];
  const { app: alice } = await startApp(relay);
  const { app: bob } = await startApp(relay, {
    onProblem: ({ message }) => problems.push(message),
  });
  bob.relays = [];
  await bob.open(await alice.share("Bob", APP), "Alice");
  await until(() => problems.some((text) => text.includes("is no relay of yours")));
  assert.equal(alice.contacts()[0].state, "invited");
  bob.relays = [[relay, null]];
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
});

test("the relay of a link is asked for no document until the user names it", async () => {
  const forward = async (response, body) => {
    const answer = await fetch(
      relay, body ? { method: "POST", body } : { headers: { Accept: "application/json" } });
    response.end(await answer.text());
  };
  const { url, requests } = await serve(forward);
  const documents = () => requests.filter(({ method }) => method === "GET").length;
  const { app: alice } = await startApp(url);
  const { app: bob } = await startApp(url, { allowPrivateRelays: true });
  bob.relays = [];
  await bob.open(await alice.share("Bob", APP), "Alice");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
  // That was Alice.
  assert.equal(documents(), 1);
  bob.relays = [url];
  await bob.disconnect("Alice");
  await bob.connect("Alice", SOON);
  await until(() => documents() === 2);
});

test("a line ends with the last mailbox at its relay", async () => {
  const { app: alice } = await startApp(relay);
  const { app: bob } = await startApp(relay);
  await bob.open(await alice.share("Bob", APP), "Alice");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
  const [line] = alice._lines.to([relay]);
  await bob.unshare("Alice");
  await until(() => alice.contacts()[0].state === "ended");
  await until(() => !alice._lines.to([relay]).length);
  assert.ok(line._isOver());
});

/** Fail for the first contact that comes. */
class BrokenAdapter extends TcpAdapter {
  gather(contact, ...rest) {
    this.broken ??= contact;
    if (contact === this.broken) throw new RangeError("a fault");
    super.gather(contact, ...rest);
  }
}

test("an effect that fails is told once and costs no other contact anything", async () => {
  const problems = [];
  const { app: alice } = await startApp(relay, {
    webrtc: new BrokenAdapter(), onProblem: ({ message }) => problems.push(message),
  });
  const { app: carol } = await startApp(relay);
  await alice.open(await carol.share("Alice", APP), "Carol");
  const { app: bob } = await startApp(relay);
  await alice.open(await bob.share("Alice", APP), "Bob");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
  const told = problems.filter((text) => text.includes('"gather" for contact 1 failed'));
  assert.equal(told.length, 1);
  assert.equal(alice.contacts()[0].state, "opened");
});

test("a step that fails rests before the next, and costs no other contact anything", async () => {
  const { app: alice } = await startApp(relay);
  const link = await alice.share("Carol", APP);
  const [entry] = alice.roster.all();
  let ticks = 0;
  const breakTicks = () => {
    entry.contact.tick = async () => {
      ticks += 1;
      throw new RangeError("a fault");
    };
    Object.defineProperty(entry.contact, "nextTickS", { value: -Infinity });
  };
  breakTicks();
  alice.roster.restore = (broken) => {
    broken.restsUntilS = Infinity;
    breakTicks();
  };
  const { app: bob } = await startApp(relay);
  await bob.open(await alice.share("Bob", APP), "Alice");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
  assert.equal(ticks, 1);
  assert.ok(link);
});

/** Return a question that the owner of a mailbox can open. */
async function questionFor(pub) {
  return encodeBase64url(await SUITE.seal(pub, CONTEXTS.question, utf8("A".repeat(43))));
}

/** Answer checks, and always have more messages. */
async function bringJunk(response, body, data) {
  const request = JSON.parse(body || "{}");
  if (Array.isArray(request)) {
    const replies = await Promise.all(request.map(async ({ pub }) => (
      { ok: true, found: true, question: await questionFor(pub) })));
    response.end(JSON.stringify(replies));
    return;
  }
  const messages = Array.from(
    { length: 100 }, (_, number) => ({ at: request.at + 1 + number, data: data() }));
  response.end(JSON.stringify({ ok: true, messages }));
}

/** Return the number of batches of checks that a relay has got. */
function checksOf(requests) {
  return requests.filter(({ body }) => body.startsWith("[")).length;
}

/** Count the messages that are opened. */
class CountingSuite extends SystemSuite {
  opened = 0;

  async open(key, info, sealed) {
    this.opened += Number(info === CONTEXTS.message);
    return super.open(key, info, sealed);
  }
}

const JUNK = {
  "ever new": () => encodeBase64url(SUITE.random(300)),
  "always the same": () => "QUJD",
};
for (const [kind, data] of Object.entries(JUNK)) {
  test(`a relay that brings too much, ${kind}, is asked seldom and delays no other`, async () => {
    const { url, requests } = await serve((response, body) => bringJunk(response, body, data));
    const problems = [];
    const suite = new CountingSuite();
    const { app: alice } = await startApp(url, {
      suite, onProblem: ({ message }) => problems.push(message),
    });
    await alice.share("Carol", APP);
    alice.relays = [[relay, null]];
    const { app: bob } = await startApp(relay);
    await bob.open(await alice.share("Bob", APP), "Alice");
    await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
    await until(() => problems.some((text) => (
      text.startsWith(`${url} brings more messages for Carol than an app sends`))));
    assert.equal(checksOf(requests), 1);
    assert.ok(suite.opened <= MAX_MESSAGES + 20);
    if (kind === "always the same") assert.ok(suite.opened <= 20);
  });
}

/** Return a store with contacts that have been told an address, and poll no link any more. */
async function pairedStore(url, ...names) {
  const store = new MemoryStore();
  const now = browserSystem().now();
  for (const name of names) {
    const [{ record }] = await Contact.invite(SUITE, now, name, [[url, null]]);
    const { invited, signer } = record;
    await store.add({
      ...record, state: "paired", current: invited, invited: null, invitation: "",
      contact: signer, contactAddress: invited.address, rotatedUs: now.wallUs,
    });
  }
  return store;
}

test("a relay that floods what only single contacts know is told as faulty", async () => {
  const { url } = await serve((response, body) => (
    bringJunk(response, body, JUNK["always the same"])));
  const problems = [];
  const store = await pairedStore(url, "Bob", "Carol");
  await startApp(url, { store, onProblem: ({ message }) => problems.push(message) });
  await until(() => problems.some((text) => text.includes("asked seldom")));
  const told = problems.filter((text) => text.includes("asked seldom"));
  assert.match(told.at(-1), /for several contacts.*it is faulty, or they are/);
});

test("a stranger who floods a link slows that invitation only", async () => {
  const { app: alice } = await startApp(relay);
  const { app: bob } = await startApp(relay);
  await bob.open(await alice.share("Bob", APP), "Alice");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
  await alice.share("Carol", APP);
  const [withBob, withCarol] = alice.roster.all();
  const now = alice.system.now();
  const [{ pub }] = withCarol.contact.mailboxes;
  const junk = Array.from({ length: MAX_BURST_MESSAGES + 1 }, (_, at) => [at + 1, `QUJD${at}`]);
  await withCarol.contact.polled(now, new Map([[pub, junk]]));
  assert.deepEqual(alice.roster.flooded(relay, { told: false }), [2]);
  assert.deepEqual(alice.roster.flooded(relay, { told: true }), []);
  assert.deepEqual(withCarol.contact.polls(now, relay), []);
  assert.ok(withBob.contact.polls(now, relay).length);
  await alice.disconnect("Bob");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
});

test("a mailbox rests after more messages than an app sends, and as long as they were", () => {
  for (const [messages, rests] of [
    [MAX_BURST_MESSAGES - 1, false],
    [MAX_BURST_MESSAGES, false],
    [MAX_BURST_MESSAGES + 1, true],
  ]) {
    const box = new Box();
    box.noteRead(1_000, Array(messages).fill(1));
    assert.equal(box.rests(1_000), rests);
    assert.equal(box.rests(1_000 + (messages - 1) / BURST_PER_S), rests);
    assert.ok(!box.rests(1_000 + messages / BURST_PER_S));
  }
});

test("a check waits no longer than a flooded mailbox of the same relay rests", async () => {
  /** @type {object[][]} */
  const after = [];
  let hasFlooded = false;
  const { url } = await serve(async (response, body) => {
    const request = JSON.parse(body || "{}");
    let reply = { ok: true, found: false };
    if (request.action === "receive" && !request.at) {
      reply.messages = Array.from({ length: 100 }, (_, at) => ({ at: at + 1, data: "QUJD" }));
    } else if (Array.isArray(request)) {
      if (hasFlooded) after.push(request);
      reply = request.map(() => ({ ok: true, found: false }));
      // Bob's mailbox, once Carol has one beside it.
      if (request.length === 2 && !hasFlooded) {
        hasFlooded = true;
        reply[0] = { ok: true, found: true, question: await questionFor(request[0].pub) };
      }
    }
    response.end(JSON.stringify(reply));
  });
  const { app: alice } = await startApp(url);
  await alice.share("Bob", APP);
  await alice.share("Carol", APP);
  await until(() => after.length);
  const waits = after[0].map(({ wait }) => wait);
  assert.equal(waits.length, 1);
  assert.ok(waits[0] > 0 && waits[0] <= 100 / BURST_PER_S);
});

test("a mailbox that brings a little in each round rests in the end", () => {
  const box = new Box();
  let brought = 0;
  for (let nowS = 0; nowS < 200; nowS += 2) {
    if (box.rests(nowS)) continue;
    box.noteRead(nowS, Array(MAX_BURST_MESSAGES).fill(1));
    brought += MAX_BURST_MESSAGES;
  }
  assert.ok(brought <= 200 * BURST_PER_S + 2 * MAX_BURST_MESSAGES);
});

test("a budget counts messages, and all octets of replies", () => {
  const budget = new Budget();
  budget.spend(MAX_MESSAGES - 1, 1);
  assert.ok(!budget.isSpent);
  budget.spend(1, 1);
  assert.ok(budget.isSpent);
  const long = new Budget();
  long.spend(0, MAX_BYTES - 1);
  assert.ok(!long.isSpent);
  long.spend(0, 1);
  assert.ok(long.isSpent);
});

test("what is over a contact's budget waits for the next round, and comes first", async () => {
  const { url } = await serve((response, body) => (
    bringJunk(response, body, JUNK["always the same"])));
  const polls = [];
  for (const at of [0, 0]) {
    const [key, pub] = await SUITE.makeKey("ECDH");
    polls.push({ mailbox: { pub, url, ext: null }, key, at });
  }
  /** @type {string[][]} */
  const read = [];
  const roster = {
    suite: SUITE,
    polls: () => polls.map((poll) => [1, poll]),
    mailboxes: () => polls.map(({ mailbox }) => mailbox),
    pollGapS: () => 2, restS: () => Infinity, broughtLately: () => 0,
    flooded: () => [],
    entries: new Map(),
  };
  const host = {
    system: { ...browserSystem(), sleep: async () => {} },
    roster, complaints: new Complaints(() => {}), page: {}, stopped: false,
    isNamed: () => true,
    async take(_, found) {
      read.push([...found.keys()]);
      host.stopped = read.length >= 3;
    },
  };
  const line = new Line(host, new RelayClient(url), new Places(2));
  await until(() => host.stopped);
  line.end();
  const [first, second] = polls.map(({ mailbox: { pub } }) => [pub]);
  assert.deepEqual(read, [first, second, first]);
});

/** Return a relay that brings so many messages for each mailbox, in turn. */
function bringing(left) {
  return serve(async (response, body) => {
    const request = JSON.parse(body || "{}");
    if (Array.isArray(request)) {
      const replies = await Promise.all(request.map(async ({ pub }) => (
        { ok: true, found: true, question: await questionFor(pub) })));
      response.end(JSON.stringify(replies));
      return;
    }
    const length = Math.min(100, left.get(request.pub));
    left.set(request.pub, left.get(request.pub) - length);
    const messages = Array.from(
      { length }, (_, number) => ({ at: request.at + 1 + number, data: "QUJD" }));
    response.end(JSON.stringify({ ok: true, messages }));
  });
}

/** Return the contacts that a line reads in a round, and what is complained of. */
async function roundOf(brought, lately) {
  const left = new Map();
  const { url } = await bringing(left);
  const polls = await Promise.all(brought.map(async (count) => {
    const [key, pub] = await SUITE.makeKey("ECDH");
    left.set(pub, count);
    return { mailbox: { pub, url, ext: null }, key, at: 0 };
  }));
  const read = [];
  const problems = [];
  const rounds = [polls.map((poll, place) => [place + 1, poll])];
  const roster = {
    suite: SUITE,
    polls() {
      host.stopped = rounds.length === 0;
      return rounds.shift() ?? [];
    },
    mailboxes: () => polls.map(({ mailbox }) => mailbox),
    pollGapS: () => 2, restS: () => Infinity, flooded: () => [],
    broughtLately: (number) => lately[number - 1],
    entries: new Map(),
  };
  const host = {
    // No time goes by, so that none of what was brought is taken off.
    system: {
      ...browserSystem(), sleep: async () => {}, now: () => ({ monotonicS: 7, wallUs: 0 }),
    },
    roster, complaints: new Complaints(({ message }) => problems.push(message)), page: {},
    stopped: false, isNamed: () => false,
    async take(number) {
      read.push(number);
    },
  };
  const line = new Line(host, new RelayClient(url), new Places(2));
  await until(() => host.stopped);
  line.end();
  return { read, problems };
}

for (const [more, count] of [[-1, 3], [0, 2], [1, 2]]) {
  test(`a relay that has brought ${more} beside its bound is read in part from there`, async () => {
    // A question counts as a message.
    const rest = MAX_RELAY_MESSAGES - (MAX_MESSAGES + 1) - 1;
    const { read, problems } = await roundOf([MAX_MESSAGES, rest + more, 7], [0, 0, 0]);
    assert.deepEqual(read, [1, 2, 3].slice(0, count));
    const behind = problems.filter((text) => text.includes("than can be read at once"));
    assert.equal(behind.length, count === 3 ? 0 : 1);
  });
}

test("contacts that have brought least are read first", async () => {
  const { read } = await roundOf([1, 1, 1], [60, 5, 0]);
  assert.deepEqual(read, [3, 2, 1]);
});

test("so many take a place at a time, and the others wait in order", async () => {
  const places = new Places(2);
  const order = [];
  const takes = [1, 2, 3, 4].map((number) => places.take().then(() => order.push(number)));
  await Promise.all(takes.slice(0, 2));
  assert.deepEqual([order, places.areTaken], [[1, 2], true]);
  places.leave();
  await takes[2];
  assert.deepEqual([order, places.areTaken], [[1, 2, 3], true]);
  places.leave();
  await takes[3];
  places.leave();
  assert.ok(!places.areTaken);
  assert.deepEqual(order, [1, 2, 3, 4]);
});

test("relays over the number that are asked at a time take turns", async () => {
  const urls = Array.from({ length: MAX_LINES + 2 }, (_, n) => `https://relay${n}.example/`);
  const asked = new Set();
  let underWay = 0;
  let most = 0;
  const fetch = async (url, { body, signal }) => {
    asked.add(url);
    underWay += 1;
    most = Math.max(most, underWay);
    await new Promise((resolve) => {
      signal.addEventListener("abort", resolve);
      if (JSON.parse(body)[0].wait === 0) setTimeout(resolve, 1);
    });
    underWay -= 1;
    return new Response('[{"ok": true, "found": false}]');
  };
  // What is longer than a pause is a time-out.
  const sleep = (seconds, signal) => new Promise((resolve) => {
    signal?.addEventListener("abort", resolve);
    if (seconds <= 5) setTimeout(resolve, 1);
  });
  const system = { fetch, sleep, now: () => ({ monotonicS: 0, wallUs: 0 }) };
  const mailboxOf = (url) => ({ pub: url, url, ext: null });
  const roster = {
    urls: () => new Set(urls),
    polls: (url) => [[1, { mailbox: mailboxOf(url), key: "", at: 0 }]],
    mailboxes: () => urls.map(mailboxOf),
    pollGapS: () => 2, restS: () => Infinity, broughtLately: () => 0, flooded: () => [],
    entries: new Map(), suite: SUITE,
  };
  const host = {
    system, roster, complaints: new Complaints(() => {}), page: {}, stopped: false,
    isNamed: () => false, take: async () => {},
  };
  const lines = new Lines(host, (url) => new RelayClient(url, system));
  lines.draw();
  await until(() => asked.size === urls.length);
  host.stopped = true;
  lines.end();
  assert.equal(most, MAX_LINES);
});

/** A network where nobody answers, and a clock that stands still. */
class Silence {
  constructor(whom) {
    this.underWay = [];
    this.nowS = 0;
    this.problems = [];
    const system = {
      fetch: (url, { signal }) => this.fetch(url, signal),
      sleep: () => new Promise(() => {}),
      now: () => ({ monotonicS: this.nowS, wallUs: 0 }),
      page: {},
    };
    const complaints = new Complaints(({ message }) => this.problems.push(message));
    this.sender = new Sender((url) => new RelayClient(url, system), system, complaints, whom);
  }

  fetch(url, signal) {
    this.underWay.push(url);
    return new Promise((_, reject) => {
      signal.addEventListener("abort", () => {
        this.underWay.splice(this.underWay.indexOf(url), 1);
        reject(new RangeError("ended"));
      });
    });
  }

  send(contact, url) {
    this.sender.send(contact, { pub: "A", url, ext: null }, "QUJD");
  }
}

test("a contact that names ever new relays holds few connections", async () => {
  const silence = new Silence();
  const urls = Array.from({ length: 24 }, (_, number) => `https://dead${number}.example/`);
  for (const url of urls) silence.send(1, url);
  for (let turn = 0; turn < 3 * MAX_LETTERS; turn += 1) silence.send(1, urls[0]);
  await until(() => silence.underWay.length === MAX_NEW_RELAYS);
  assert.deepEqual(silence.underWay, urls.slice(0, MAX_NEW_RELAYS));
  await until(() => silence.problems.length);
  assert.deepEqual(silence.problems, [
    "Contact 1 names ever new relays: not all of them are asked."]);
  // One more in a minute, and the oldest queue ends for it.
  silence.nowS += NEW_RELAY_EVERY_S - 1;
  silence.send(1, urls[10]);
  silence.nowS += 1;
  silence.send(1, urls[11]);
  silence.send(1, urls[12]);
  await until(() => silence.underWay.includes(urls[11]));
  assert.deepEqual(silence.underWay, [...urls.slice(1, MAX_NEW_RELAYS), urls[11]]);
});

test("many contacts hold so many connections and no more", async () => {
  const silence = new Silence();
  const contacts = MAX_QUEUES / MAX_QUEUES_OF_CONTACT;
  for (let contact = 0; contact <= contacts; contact += 1) {
    for (let number = 0; number < MAX_QUEUES_OF_CONTACT; number += 1) {
      silence.send(contact, `https://dead${number}.example${contact}a/`);
    }
  }
  await until(() => silence.underWay.length === MAX_QUEUES);
  const last = silence.underWay.filter((url) => url.endsWith(`example${contacts}a/`));
  assert.equal(last.length, MAX_QUEUES_OF_CONTACT);
});

test("strangers of all contacts hold so many connections and no more", async () => {
  for (const more of [-1, 0, 1]) {
    const silence = new Silence({ toStrangers: true });
    for (let number = 0; number < MAX_QUEUES_OF_STRANGERS + more; number += 1) {
      const contact = Math.floor(number / MAX_QUEUES_OF_CONTACT);
      silence.send(contact, `https://stranger${number}.example/`);
    }
    const held = MAX_QUEUES_OF_STRANGERS + Math.min(more, 0);
    await until(() => silence.underWay.length === held);
  }
});

/** Have somebody open a link who wants the answer in a mailbox of that key and relay. */
async function sayHello(link, pub, url) {
  const { address, secret } = readLink(link, { allowHttp: true });
  const [key, from] = await SUITE.makeKey("ECDSA");
  const connectoid = `${pub}.${encodeBase64url(utf8(url))}`;
  const nonce = encodeBase64url(SUITE.random(16));
  const payload = {
    type: "hello", to: address, from, seq: 1, re: null, connectoid, nonce,
    sdpOffer: makeSdp("offer"),
  };
  const jws = await signJws(SUITE, key, payload);
  const text = `${jws}.${await prove(secret, jws)}`;
  for (const mailbox of parseAddress(address, { allowHttp: true })) {
    const data = await sealMessage(SUITE, mailbox.pub, text);
    const body = JSON.stringify({ pub: mailbox.pub, ext: null, action: "send", data });
    const response = await fetch(relay, { method: "POST", body });
    assert.deepEqual(await response.json(), { ok: true });
  }
}

/** Return Alice's app and Bob's, paired, and the link that strangers have read. */
async function startPairWith(options) {
  const { app: alice } = await startApp(relay, options);
  const { app: bob } = await startApp(relay);
  const link = await alice.share("Bob", APP);
  await bob.open(link, "Alice");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
  await until(() => bob.contacts()[0].state === "paired");
  return { alice, bob, link };
}

test("strangers with many relays keep no app from writing to a contact that moves", async () => {
  const asked = new Set();
  const problems = [];
  const { bob, link } = await startPairWith({
    onProblem: ({ message }) => problems.push(message),
    fetch: async (url, init) => {
      if (url === relay) return fetch(url, init);
      asked.add(url);
      throw new TypeError("nobody is there");
    },
  });
  for (let number = 0; number < MAX_NEW_RELAYS; number += 1) {
    const [, pub] = await SUITE.makeKey("ECDH");
    await sayHello(link, pub, `https://stranger${number}.example/`);
  }
  await until(() => asked.size === MAX_NEW_RELAYS);
  await bob.move("Alice", [relay, "https://elsewhere.example/"]);
  await until(() => asked.has("https://elsewhere.example/"));
  assert.deepEqual(problems.filter((text) => /stranger|ever new relays/.test(text)), []);
});

test("a stranger at the contact's own relay holds up nothing that goes there", async () => {
  const [, slow] = await SUITE.makeKey("ECDH");
  let underWay = 0;
  const { alice, bob, link } = await startPairWith({
    fetch: (url, init) => {
      if (!init.body?.includes(slow)) return fetch(url, init);
      underWay += 1;
      return new Promise(() => {});
    },
  });
  await sayHello(link, slow, relay);
  await until(() => underWay);
  await alice.disconnect("Bob");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
  assert.equal(underWay, 1);
});
