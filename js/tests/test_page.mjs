/** A runner in a page of its own time, at a relay that is a function. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { Contact } from "../connectoid.js";
import { pauseS } from "../pauses.js";
import { SUITE, makeSdp, startApp } from "./harness.mjs";

const APP = "https://app.example.com/";
const RELAY = "https://relay.example.com/";

/** What some browsers say of the network. */
class FakeConnection extends EventTarget {
  type = "wifi";

  change(type) {
    this.type = type;
    this.dispatchEvent(new Event("change"));
  }
}

/** Reject once a signal says so. */
function aborted(signal) {
  return new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
  });
}

/** A page, its time and its network. `pass` lets seconds go by, one by one. */
class FakePage {
  constructor(answer) {
    this.requests = [];
    this.page = new EventTarget();
    const document = new EventTarget();
    this.page.navigator = { connection: new FakeConnection() };
    this.page.document = Object.assign(document, { visibilityState: "visible" });
    this.monotonicS = 0;
    this._answer = answer;
    // What the relay says of itself.
    this.ofItself = () => ({});
    this._sleeping = new Set();
  }

  now() {
    const wallUs = 1_800_000_000_000_000 + this.monotonicS * 1e6;
    return { wallUs, monotonicS: this.monotonicS };
  }

  sleep(seconds, signal) {
    return new Promise((resolve) => {
      this._sleeping.add({ untilS: this.monotonicS + Math.max(seconds, 0), resolve });
      signal?.addEventListener("abort", () => resolve());
      if (signal?.aborted || seconds <= 0) resolve();
    });
  }

  async fetch(url, { body = null, ...init }) {
    const request = JSON.parse(body);
    this.requests.push({ atS: this.monotonicS, request, init });
    const reply = request ? await this._reply(request, init.signal) : this.ofItself();
    return new Response(typeof reply === "string" ? reply : JSON.stringify(reply));
  }

  _reply(request, signal) {
    return Promise.race([aborted(signal), this._answer(request, this.monotonicS)]);
  }

  async pass(seconds) {
    for (const endS = this.monotonicS + seconds; this.monotonicS < endS; this.monotonicS += 1) {
      this._wakeSleepers();
      // All their work is done before the next second.
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
  }

  _wakeSleepers() {
    for (const sleeper of this._sleeping) {
      if (sleeper.untilS > this.monotonicS) continue;
      this._sleeping.delete(sleeper);
      sleeper.resolve();
    }
  }

  /** Return the times of all requests but those for the relay's document. */
  get times() {
    return this.requests.filter(({ request }) => request).map(({ atS }) => atS);
  }
}

function findNothing(request) {
  if (!Array.isArray(request)) return { ok: true };
  return request.map(() => ({ ok: true, found: false }));
}

/** Start a runner in a fake page. */
async function startFaked(answer = findNothing) {
  const fake = new FakePage(answer);
  const { app } = await startApp(RELAY, {
    page: fake.page,
    now: () => fake.now(),
    sleep: (seconds, signal) => fake.sleep(seconds, signal),
    fetch: (url, init) => fake.fetch(url, init),
  });
  return { app, fake };
}

test("requests carry nothing and follow nothing", async () => {
  const { app, fake } = await startFaked();
  await app.share("Bob", APP);
  await fake.pass(5);
  for (const { init } of fake.requests) {
    const { redirect, credentials, cache, referrerPolicy } = init;
    assert.deepEqual(
      [redirect, credentials, cache, referrerPolicy],
      ["error", "omit", "no-store", "no-referrer"]);
  }
});

test("without contacts nothing is asked", async () => {
  const { fake } = await startFaked();
  await fake.pass(300);
  assert.equal(fake.requests.length, 0);
});

test("a hidden page asks once a minute without waiting", async () => {
  const { app, fake } = await startFaked();
  const { document } = fake.page;
  document.visibilityState = "hidden";
  await app.share("Bob", APP);
  await fake.pass(100);
  fake.requests.length = 0;
  await fake.pass(600);
  const count = fake.requests.length;
  assert.ok(count >= 9 && count <= 11, `${count} in ten minutes`);
  assert.ok(fake.requests.every(({ request }) => request[0].wait === 0));
  document.visibilityState = "visible";
  document.dispatchEvent(new Event("visibilitychange"));
  fake.requests.length = 0;
  await fake.pass(3);
  assert.equal(fake.requests[0].request[0].wait, 60);
});

test("a page that is left asks nothing until it is shown again", async () => {
  const { app, fake } = await startFaked();
  await app.share("Bob", APP);
  await fake.pass(5);
  fake.page.dispatchEvent(new Event("pagehide"));
  await fake.pass(5);
  fake.requests.length = 0;
  await fake.pass(300);
  assert.equal(fake.requests.length, 0);
  fake.page.dispatchEvent(new Event("pageshow"));
  await fake.pass(3);
  assert.equal(fake.requests.length, 1);
});

test("a relay that fails is asked often, later seldom, at once with the network", async () => {
  const { app, fake } = await startFaked(() => "rubbish");
  await app.share("Bob", APP);
  await fake.pass(1_000);
  const { times } = fake;
  for (const [place, atS] of times.slice(1).entries()) {
    const awayS = times[place] - times[0];
    assert.ok(atS - times[place] >= pauseS(awayS), `${times}`);
    assert.ok(atS - times[place] <= 1.25 * pauseS(awayS) + 2, `${times}`);
  }
  assert.ok(fake.requests.slice(2).every(({ request }) => !request || request[0].wait === 0));
  fake.requests.length = 0;
  fake.page.dispatchEvent(new Event("online"));
  await fake.pass(3);
  assert.equal(fake.times.length, 1);
});

test("a hidden page asks a relay that fails once a minute", async () => {
  const { app, fake } = await startFaked(() => "rubbish");
  fake.page.document.visibilityState = "hidden";
  await app.share("Bob", APP);
  await fake.pass(100);
  fake.requests.length = 0;
  await fake.pass(600);
  assert.ok(fake.times.length >= 8 && fake.times.length <= 11, `${fake.times}`);
});

test("pauses are a hundredth of what went before, within bounds", () => {
  for (const [awayS, expectedS] of [
    [0, 2], [199, 2], [200, 2], [201, 2.01], [5_999, 59.99], [6_000, 60], [6_001, 60],
  ]) {
    assert.ok(Math.abs(pauseS(awayS) - expectedS) < 1e-9, `${awayS}`);
  }
});

test("an offer waits until a relay of one's own answers, and is made then", async () => {
  let isThere = false;
  const { app, fake } = await startFaked((request) => (isThere ? findNothing(request) : "rubbish"));
  fake.ofItself = () => (isThere ? {} : "rubbish");
  const now = { wallUs: 1, monotonicS: 1 };
  const [{ record }] = await Contact.invite(SUITE, now, "", [[RELAY, null]]);
  const gathered = [];
  app.webrtc.gather = (number, attemptId, offer, ice) => {
    ice.then(() => gathered.push(attemptId));
  };
  await app.open(record.invitation, "Alice");
  await fake.pass(9);
  assert.deepEqual(gathered, []);
  isThere = true;
  await fake.pass(5);
  const [{ contact }] = app.roster.entries.values();
  assert.ok(gathered.includes(contact.attempt.attemptId), `${gathered}`);
});

test("a relay that says when to come again is obeyed", async () => {
  const { app, fake } = await startFaked((_, atS) => (
    { ok: false, error: "Too often", retry: atS < 1 ? 200 : 5_000 }));
  await app.share("Bob", APP);
  await fake.pass(2_500);
  const [first, second, third] = fake.times;
  assert.ok(second - first >= 200 && second - first <= 252, `${fake.times}`);
  assert.ok(third - second >= 900 && third - second <= 1_127, `${fake.times}`);
});

test("with another network, what waits goes on at once, and connections are doubted", async () => {
  const { app, fake } = await startFaked((request) => (
    Array.isArray(request) ? findNothing(request) : "rubbish"));
  const now = { wallUs: 1, monotonicS: 1 };
  const [{ record }] = await Contact.invite(SUITE, now, "", [[RELAY, null]]);
  const { webrtc } = app;
  webrtc.gather = (contact, attemptId) => {
    webrtc.report(contact, "gathered", attemptId, makeSdp("offer"));
  };
  let doubts = 0;
  webrtc.doubt = () => {
    doubts += 1;
  };
  await app.open(record.invitation, "Alice");
  const sends = () => fake.requests.filter(({ request }) => request?.action === "send").length;
  // Once it has failed there are 2 s to wait.
  while (!sends()) await fake.pass(1);
  fake.page.navigator.connection.change("wifi");
  await fake.pass(1);
  assert.deepEqual([sends(), doubts], [1, 0], "a change of speed");
  fake.page.navigator.connection.change("cellular");
  await fake.pass(1);
  assert.deepEqual([sends(), doubts], [2, 1]);
});

test("an end that falls silent has the way to a relay tried at once, without waiting", async () => {
  let isDead = false;
  const { app, fake } = await startFaked((request) => (
    isDead ? new Promise(() => {}) : findNothing(request)));
  await app.share("Bob", APP);
  await fake.pass(5);
  isDead = true;
  fake.requests.length = 0;
  app.webrtc.report(1, "silent", 0);
  // What goes over the former connection is never answered.
  await fake.pass(3);
  isDead = false;
  await fake.pass(10);
  const checks = fake.requests.filter(({ request }) => Array.isArray(request));
  const [first, second, third] = checks.map(({ atS, request: [{ wait }] }) => ({ atS, wait }));
  assert.deepEqual([first.wait, second.wait, third.wait], [0, 0, 60]);
  assert.ok(second.atS - first.atS <= 7, "it failed soon");
});

test("a message that is lost on its way to a relay is sent again", async () => {
  let failures = 3;
  const { app, fake } = await startFaked((request) => {
    if (Array.isArray(request)) return findNothing(request);
    failures -= 1;
    return failures >= 0 ? "rubbish" : { ok: true };
  });
  const now = { wallUs: 1, monotonicS: 1 };
  const [{ record }] = await Contact.invite(SUITE, now, "", [[RELAY, null]]);
  const { webrtc } = app;
  webrtc.gather = (contact, attemptId) => {
    webrtc.report(contact, "gathered", attemptId, makeSdp("offer"));
  };
  await app.open(record.invitation, "Alice");
  // The machine sends the hello anew after 50 seconds.
  await fake.pass(90);
  const sends = fake.requests.filter(({ request }) => request?.action === "send");
  const sent = sends.map(({ request }) => request.data);
  assert.equal(sent.filter((data) => data === sent[0]).length, 4);
});
