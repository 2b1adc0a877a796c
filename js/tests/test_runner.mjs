/** Runners at a real relay: everything but WebRTC. */

import assert from "node:assert/strict";
import { before, test } from "node:test";

import {
  Connectoid, LinkError, NotConnectedError, OtherAppError, StoreError, UsageError, parseAddress,
} from "../connectoid.js";
import { MAX_QUEUED_MESSAGES } from "../channel.js";
import { MAX_CHANNEL_BYTES } from "../limits.js";
import { MemoryStore, TcpAdapter, serve, startApp, startRelay, until } from "./harness.mjs";

const APP = "https://app.example.com/";

let relay = "";
before(async () => {
  relay = await startRelay();
});

/** Connect Alice's runner and Bob's. */
function connect(alice, bob) {
  const options = { timeoutS: 30 };
  return Promise.all([alice.connect("Bob", options), bob.connect("Alice", options)]);
}

/** Return the runners of Alice and Bob, and what Alice's tells. */
async function startPair(options = {}) {
  const { app: alice, told } = await startApp(relay, options);
  const { app: bob } = await startApp(relay, options);
  const link = await alice.share("Bob", `${APP}#x`);
  await bob.open(link, "Alice");
  // The same link goes on with the same contact.
  await bob.open(link, "Alice again");
  return { alice, bob, told };
}

test("two runners pair through a relay, connect and talk", async () => {
  const { alice, bob } = await startPair();
  const [hers, his] = await connect(alice, bob);
  await hers.send("hello");
  assert.equal(await his.receive(), "hello");
  for (let number = 0; number < 200; number += 1) await his.send(Uint8Array.of(number, 1));
  await his.send("end");
  for (let number = 0; number < 200; number += 1) {
    assert.deepEqual(await hers.receive(), Uint8Array.of(number, 1));
  }
  assert.equal(await hers.receive(), "end");
  assert.deepEqual(alice.contacts()[0].comparison, bob.contacts()[0].comparison);
  await his.close();
  await assert.rejects(hers.receive(), NotConnectedError);
  await bob.verify("Alice");
  assert.ok(bob.contacts()[0].verified);
  await bob.verify("Alice", { same: false });
  const [{ verified, differs }] = bob.contacts();
  assert.deepEqual([verified, differs], [false, true]);
});

/** Ways to end a connection, from a listener. */
const ENDS = {
  closes: (app, channel) => channel.close(),
  disconnects: (app) => app.disconnect("Bob"),
  unshares: (app) => app.unshare("Bob"),
};

for (const [does, end] of Object.entries(ENDS)) {
  for (const isEarly of [true, false]) {
    const kind = isEarly ? "came before it" : "comes";
    test(`a listener that ${does} with what ${kind} hears the end, and no more`, async () => {
      const { alice, bob } = await startPair();
      const [hers, his] = await connect(alice, bob);
      const heard = [];
      const listener = (message) => {
        heard.push(message);
        if (message !== null) end(alice, hers);
      };
      if (!isEarly) hers.listen(listener);
      await his.send("hello");
      await until(() => hers._came.length || heard.length);
      if (isEarly) hers.listen(listener);
      await assert.rejects(his.receive(), NotConnectedError);
      await until(() => heard.length === 2);
      assert.deepEqual(heard, ["hello", null]);
    });
  }

  test(`a listener that fails does not keep what ${does} from its end`, async (context) => {
    const { alice, bob } = await startPair();
    const [hers, his] = await connect(alice, bob);
    const logged = context.mock.method(console, "error", () => {});
    hers.listen((message) => {
      throw new Error(`the app's own fault: ${message}`);
    });
    await his.send("hello");
    await until(() => logged.mock.callCount());
    await end(alice, hers);
    await assert.rejects(his.receive(), NotConnectedError);
    assert.equal(logged.mock.callCount(), 2);
  });
}

test("a channel carries messages of 64 KiB, and closes on a larger one", async () => {
  const { alice, bob } = await startPair();
  const [hers, his] = await connect(alice, bob);
  for (const size of [MAX_CHANNEL_BYTES - 1, MAX_CHANNEL_BYTES]) {
    await his.send("a".repeat(size));
    assert.equal((await hers.receive()).length, size);
  }
  // A text counts as UTF-8.
  await assert.rejects(his.send("ä".repeat(MAX_CHANNEL_BYTES / 2 + 1)), UsageError);
  const tooLarge = new Uint8Array(MAX_CHANNEL_BYTES + 1);
  await assert.rejects(his.send(tooLarge), UsageError);
  // A contact whose app does not ask.
  await bob.webrtc.write(1, his.attemptId, tooLarge);
  await assert.rejects(hers.receive(), /a message of more than 64 KiB came/);
  await assert.rejects(his.receive(), NotConnectedError);
});

test("a contact that opens another channel loses the connection", async () => {
  const { alice, bob } = await startPair();
  const [hers, his] = await connect(alice, bob);
  alice.webrtc.report(1, "refused", hers.attemptId);
  await assert.rejects(hers.receive(), /the other end broke the rules of data channels/);
  await assert.rejects(his.receive(), NotConnectedError);
});

test("an app that takes no messages loses the connection, with as many as may wait", async () => {
  const { alice, bob } = await startPair();
  const [hers, his] = await connect(alice, bob);
  for (let number = 0; number < 5_000 && !his.closed; number += 1) {
    await his.send(String(number)).catch(() => {});
  }
  await assert.rejects(his.receive(), NotConnectedError);
  for (let number = 0; number < MAX_QUEUED_MESSAGES; number += 1) {
    assert.equal(await hers.receive(), String(number));
  }
  await assert.rejects(hers.receive(), /1024 messages wait/);
});

test("messages that come while a step waits for the store are bounded too", async () => {
  const store = new MemoryStore();
  const { app: alice } = await startApp(relay, { store });
  const { app: bob } = await startApp(relay);
  await bob.open(await alice.share("Bob", APP), "Alice");
  const [hers, his] = await connect(alice, bob);
  let release;
  const released = new Promise((resolve) => {
    release = resolve;
  });
  store.save = () => released;
  const verified = alice.verify("Bob");
  const { entries } = alice.roster;
  for (let number = 0; number < 3 * MAX_QUEUED_MESSAGES && !his.closed; number += 1) {
    await his.send(String(number)).catch(() => {});
  }
  await until(() => hers.closed);
  assert.ok(entries.get(1).waiting <= MAX_QUEUED_MESSAGES + 5);
  release();
  await verified;
  await assert.rejects(hers.receive(), /1024 messages wait/);
});

test("a listener gets one message after the other, and may fail", async (context) => {
  context.mock.method(console, "error", () => {});
  const { alice, bob } = await startPair();
  const [hers, his] = await connect(alice, bob);
  const heard = [];
  let [running, most] = [0, 0];
  hers.listen(async (message) => {
    running += 1;
    most = Math.max(most, running);
    await new Promise((resolve) => setTimeout(resolve));
    running -= 1;
    heard.push(message);
    if (message === "3") throw new Error("a fault of the app");
  });
  for (let number = 0; number < 100; number += 1) await his.send(String(number));
  await his.close();
  await until(() => heard.includes(null));
  assert.equal(most, 1);
  assert.deepEqual(heard, [...Array.from({ length: 100 }, (_, number) => String(number)), null]);
});

test("a contact moves to another relay, and ends", async () => {
  const { alice, bob, told } = await startPair({ allowPrivateRelays: true });
  await connect(alice, bob);
  const other = await startRelay();
  await alice.move("Bob", [other]);
  await connect(alice, bob);
  assert.deepEqual(alice.contacts()[0].relays, [[other, null]]);
  const [{ contactAddress }] = bob.contacts();
  const mailboxes = parseAddress(contactAddress, { allowHttp: true });
  assert.deepEqual(mailboxes.map(({ url }) => url), [other]);
  await bob.unshare("Alice");
  await until(() => told.includes("unshared"));
  assert.deepEqual(bob.contacts(), []);
  assert.equal(alice.contacts()[0].state, "ended");
  await assert.rejects(alice.connect("Bob"), NotConnectedError);
  // A new contact takes the place of the one that ended.
  await alice.share("Bob", APP);
});

test("a contact that has ended keeps its name until another one takes it", async () => {
  const { alice, bob } = await startPair();
  const { app: carol } = await startApp(relay, { app: "org.example.chat" });
  const theirs = await carol.share("Alice", APP);
  await bob.unshare("Alice");
  await until(() => alice.contacts()[0].state === "ended");
  await assert.rejects(alice.open(theirs, "Bob"), OtherAppError);
  await assert.rejects(alice.open(theirs.slice(0, -4), "Bob"), LinkError);
  alice.relays = [];
  await assert.rejects(alice.share("Bob", APP), UsageError);
  assert.deepEqual(alice.contacts().map(({ why }) => why), ["unshared"]);
  alice.relays = [relay];
  await alice.share("Bob", APP);
  assert.deepEqual(alice.contacts().map(({ state }) => state), ["invited"]);
});

test("the link of another app is refused, nothing is sent, and it opens in its own", async () => {
  const asked = [];
  const noted = (url, ...rest) => {
    asked.push(url);
    return fetch(url, ...rest);
  };
  const { app: alice } = await startApp(relay, { app: "org.example.list" });
  const link = await alice.share("Bob", APP);
  for (const options of [{ app: "org.example.chat" }, {}]) {
    const { app: eve } = await startApp(relay, { ...options, fetch: noted });
    await assert.rejects(eve.open(link, "Alice"), OtherAppError);
    assert.deepEqual([eve.contacts(), asked], [[], []]);
  }
  const { app: bob } = await startApp(relay, { app: "org.example.list" });
  await bob.open(link, "Alice");
  await until(() => alice.contacts()[0].state === "paired");
});

test("an app's identifier is short and plain", async () => {
  for (const app of ["a", "a".repeat(127), "a".repeat(128)]) await startApp(relay, { app });
  for (const app of ["a".repeat(129), "a list", "-a"]) {
    await assert.rejects(startApp(relay, { app }), UsageError);
  }
});

test("where WebRTC is missing, that is told, and contacts can be made and seen", async () => {
  const problems = [];
  const onProblem = ({ message }) => problems.push(message);
  const { app } = await startApp(relay, { webrtc: undefined, onProblem });
  await app.share("Bob", APP);
  const seen = app.contacts().map(({ name, state }) => [name, state]);
  assert.deepEqual(seen, [["Bob", "invited"]]);
  assert.deepEqual(problems, [
    "WebRTC is missing or off here: contacts can be seen and ended, but not connected."]);
});

test("contacts go on after a restart", async () => {
  const store = new MemoryStore();
  const { app: former } = await startApp(relay, { store });
  const { app: bob } = await startApp(relay);
  const link = await former.share("Bob", APP);
  await former.close();
  await bob.open(link, "Alice");
  const { app: alice } = await startApp(relay, { store });
  const [hers, his] = await connect(alice, bob);
  await hers.send("there again");
  assert.equal(await his.receive(), "there again");
});

test("misuse of a runner is an error that says what to do", async () => {
  const { app } = await startApp(relay);
  const link = await app.share("Bob", APP);
  await assert.rejects(app.share("Bob", APP), UsageError);
  await assert.rejects(app.share("", APP), UsageError);
  await assert.rejects(app.open(link, "Alice"), /your own link/);
  await assert.rejects(app.open(APP, "Alice"), LinkError);
  await assert.rejects(app.connect("Carol"), UsageError);
  await assert.rejects(app.verify("Bob"), UsageError);
  await assert.rejects(app.forget("Bob"), UsageError);
  await assert.rejects(app.connect("Bob", { timeoutS: 0.05 }), /Bob has not opened/);
});

test("a runner is started once, unless that failed, and never after its end", async () => {
  const store = new MemoryStore();
  const load = store.load.bind(store);
  store.load = async () => {
    throw new StoreError("damaged");
  };
  const app = new Connectoid(store, [relay], { webrtc: new TcpAdapter() });
  await assert.rejects(app.start(), StoreError);
  store.load = load;
  const starting = app.start();
  await assert.rejects(app.start(), UsageError);
  await starting;
  await app.share("Bob", APP);
  await assert.rejects(app.start(), UsageError);
  await app.close();
  await assert.rejects(app.start(), UsageError);
});

test("a runner that is closed twice ends once, and both calls wait for it", async () => {
  const closed = [];
  const store = new MemoryStore();
  store.close = () => closed.push("store");
  const webrtc = new TcpAdapter();
  webrtc.stop = () => closed.push("webrtc");
  const { app } = await startApp(relay, { store, webrtc });
  await Promise.all([app.close(), app.close()]);
  await app.close();
  assert.deepEqual(closed, ["webrtc", "store"]);
});

test("a runner closes its store even if WebRTC fails to stop", async () => {
  let isClosed = false;
  const store = new MemoryStore();
  store.close = () => {
    isClosed = true;
  };
  const webrtc = new TcpAdapter();
  webrtc.stop = () => {
    throw new Error("no end");
  };
  const app = new Connectoid(store, [relay], { webrtc });
  await app.start();
  await assert.rejects(app.close(), /no end/);
  assert.ok(isClosed);
});

test("what cannot be saved is not sent", async () => {
  const store = new MemoryStore();
  const { url, requests } = await serve((response) => response.end('{"ok":true}'));
  const { app } = await startApp(url, { store });
  await app.share("Bob", APP);
  const [before] = app.contacts();
  store.save = async () => {
    throw new StoreError("full");
  };
  await assert.rejects(app.unshare("Bob"), StoreError);
  assert.deepEqual(app.contacts()[0], before);
  assert.ok(!requests.some(({ body }) => body.includes('"send"')));
});

/** WebRTC that makes nothing, and keeps what it was given. */
class AskedWebRTC {
  asked = [];

  start() {}

  gather(contact, attemptId, offer, ice) {
    this.asked.push(ice);
  }

  close() {}

  doubt() {}

  stop() {}
}

test("by relay alone WebRTC gets TURN servers only, and says if there are none", async () => {
  const answers = (response) => response.end('{"ok":true,"stun":true}');
  const { url } = await serve(answers);
  const stun = { urls: `stun:${new URL(url).host}` };
  const turn = { urls: ["turn:turn.example.com"], username: "alice", credential: "secret" };
  const { app: other } = await startApp(relay);
  const link = await other.share("Alice", APP);
  const webrtc = new AskedWebRTC();
  const { app } = await startApp(url, { webrtc, iceServers: [turn] });
  await app.open(link, "Bob");
  await until(() => webrtc.asked.length === 1);
  assert.deepEqual(await webrtc.asked[0], { iceServers: [stun, turn] });
  app.privacy = { relayOnly: true };
  await app.open(await other.share("Alice too", APP), "Carol");
  await until(() => webrtc.asked.length === 2);
  assert.deepEqual(
    await webrtc.asked[1], { iceServers: [turn], iceTransportPolicy: "relay" });
  const problems = [];
  const lonely = new AskedWebRTC();
  const onProblem = (problem) => problems.push(problem.message);
  const { app: third } = await startApp(url, { webrtc: lonely, onProblem });
  third.privacy = { relayOnly: true };
  await third.open(await other.share("Alice again", APP), "Dora");
  await until(() => lonely.asked.length === 1);
  assert.deepEqual(await lonely.asked[0], { iceServers: [], iceTransportPolicy: "relay" });
  assert.match(problems.join(), /^Dora: connections by relay alone need a TURN server/);
});

test("a relay that was away at the start is asked for STUN once it is back", async () => {
  let isBack = false;
  // At first the network answers itself, with a page where users have to log in.
  const { url, requests } = await serve((response) => {
    response.end(isBack ? '{"ok":true,"stun":true}' : "<html>Log in</html>");
  });
  const { app: other } = await startApp(relay);
  const webrtc = new AskedWebRTC();
  const { app } = await startApp(url, { webrtc });
  await app.share("Carol", APP);
  await until(() => requests.some(({ method }) => method === "POST"));
  isBack = true;
  const documents = () => requests.filter(({ method }) => method === "GET").length;
  await until(() => documents() > 1);
  await app.open(await other.share("Alice", APP), "Bob");
  await until(() => webrtc.asked.length === 1);
  const stun = { urls: `stun:${new URL(url).host}` };
  assert.deepEqual(await webrtc.asked[0], { iceServers: [stun] });
});

test("a check that waits ends where the document was missed, which is asked anew", async () => {
  let documents = 0;
  const { url } = await serve((response, body) => {
    // The check that waits is never answered.
    if (body) return;
    documents += 1;
    if (documents === 1) setTimeout(() => response.destroy(), 500);
    else response.end('{"ok":true,"stun":true}');
  });
  const { app: other } = await startApp(relay);
  const webrtc = new AskedWebRTC();
  const { app } = await startApp(url, { webrtc });
  await app.open(await other.share("Alice", APP), "Bob");
  await until(() => webrtc.asked.length === 1);
  assert.deepEqual(await webrtc.asked[0], { iceServers: [{ urls: `stun:${new URL(url).host}` }] });
  assert.equal(documents, 2);
});
