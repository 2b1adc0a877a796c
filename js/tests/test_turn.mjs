/** TURN servers that a relay lends: who asks for them, for whom, and how long they are kept. */

import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { before, test } from "node:test";

import {
  CONTEXTS, Connectoid, RelayClient, RelayError, UsageError, checkIceServers, encodeBase64url,
} from "../connectoid.js";
import { PeerAdapter } from "../webrtc.js";
import { Loans } from "../turn.js";
import { MemoryStore, SUITE, closing, serve, startApp, startRelay, until } from "./harness.mjs";

const APP = "https://app.example.com/";
const URL_ = "turn:turn.example.com:3478";
const SECRET = "4f1de7f2c5a84f1de7f2c5a8";

let relay = "";
before(async () => {
  const folder = await mkdtemp(join(tmpdir(), "connectoid-turn-"));
  closing.push(() => rm(folder, { recursive: true }));
  const file = join(folder, "secret");
  await writeFile(file, SECRET, { mode: 0o600 });
  relay = await startRelay("--turn", URL_, "--turn-secret", file);
});

/** WebRTC that notes what it may ask, and makes no connections. */
class AskedWebRTC {
  asked = [];

  start() {}

  gather(contact, attemptId, offer, ice) {
    this.asked.push(ice);
  }

  close() {}

  stop() {}
}

/** Return what WebRTC may ask for contacts whose links an app has opened, by `options`. */
async function gatherFor(names, options, privacy = {}) {
  const webrtc = new AskedWebRTC();
  const { app: other } = await startApp(relay);
  const { app } = await startApp(relay, { webrtc, ...options });
  app.privacy = privacy;
  for (const name of names) await app.open(await other.share(`${name}'s`, APP), name);
  await until(() => webrtc.asked.length === names.length);
  return Promise.all(webrtc.asked);
}

test("WebRTC gets the TURN servers of one's own relay, with a name for each contact", async () => {
  const mine = { urls: "turn:mine.example.com", username: "alice", credential: "secret" };
  const asked = await gatherFor(["Bob", "Carol"], { iceServers: [mine] });
  const [[first, bobs], [, carols]] = asked.map(({ iceServers }) => iceServers);
  assert.deepEqual(first, mine);
  for (const server of [bobs, carols]) {
    assert.deepEqual(Object.keys(server), ["urls", "username", "credential"]);
    assert.deepEqual(server.urls, [URL_]);
    assert.match(server.username, /^\d{10}:[\da-f]{16}$/);
  }
  assert.notEqual(bobs.username.split(":")[1], carols.username.split(":")[1]);
});

test("by relay alone WebRTC gets what is lent, and nobody complains", async () => {
  const problems = [];
  const onProblem = (problem) => problems.push(problem.message);
  const [ice] = await gatherFor(["Bob"], { onProblem }, { relayOnly: true });
  assert.equal(ice.iceTransportPolicy, "relay");
  assert.deepEqual(ice.iceServers.map(({ urls }) => urls), [[URL_]]);
  assert.deepEqual(problems, []);
});

test("what is lent is not kept with the contact", async () => {
  const store = new MemoryStore();
  const webrtc = new AskedWebRTC();
  const { app: other } = await startApp(relay);
  const { app } = await startApp(relay, { webrtc, store });
  await app.open(await other.share("Alice", APP), "Bob");
  await until(() => webrtc.asked.length === 1);
  const { iceServers: [lent] } = await webrtc.asked[0];
  const kept = JSON.stringify([...store.records]);
  assert.ok(lent.credential && !kept.includes(lent.credential) && !kept.includes(lent.username));
});

/** Return a relay that lends `turn` to whoever proves a mailbox, and that mailbox. */
async function startLender(turn) {
  const [key, pub] = await SUITE.makeKey("ECDH");
  const sealed = await SUITE.seal(pub, CONTEXTS.question, new TextEncoder().encode("answer"));
  const question = encodeBase64url(sealed);
  const { url, requests } = await serve((response, body) => {
    const { prove, turn: asks } = JSON.parse(body);
    const reply = { ok: true, found: false };
    if (prove) reply.question = question;
    if (asks) reply.turn = turn;
    response.end(JSON.stringify(reply));
  });
  const poll = { mailbox: { pub, url, ext: null }, key };
  return { client: new RelayClient(url), poll, requests };
}

test("a loan is renewed after half of its time, and used until its end", async () => {
  const turn = { urls: [URL_], username: "alice", credential: "secret", ttl: 100 };
  const { client, poll, requests } = await startLender(turn);
  let nowS = 0;
  const loans = new Loans(client, SUITE, () => nowS);
  const seen = [];
  for (nowS of [0, 49.9, 50, 149.9, 300]) {
    const isKnown = loans.of(poll) !== undefined;
    await loans.renew(poll);
    seen.push([requests.length / 2, isKnown]);
  }
  assert.deepEqual(seen, [[1, false], [1, true], [2, true], [3, true], [4, false]]);
  const other = { ...poll, mailbox: { ...poll.mailbox, pub: "another" } };
  await loans.renew(poll);
  assert.deepEqual([loans.of(poll)?.username, loans.of(other)], ["alice", undefined]);
});

test("rubbish instead of TURN servers is refused, and nothing lent is nothing", async () => {
  for (const turn of [[], { urls: [URL_] }, "turn:turn.example.com", null]) {
    const { client, poll } = await startLender(turn);
    const loans = new Loans(client, SUITE, () => 0);
    await assert.rejects(loans.renew(poll), RelayError);
    assert.equal(loans.of(poll), undefined);
  }
  const { client, poll } = await startLender(undefined);
  const loans = new Loans(client, SUITE, () => 0);
  await loans.renew(poll);
  assert.equal(loans.of(poll), undefined);
});

// -- Servers that a user names -----------------------------------------------------------

const PASSWORD = "mellon-mellon";
const TURN = { urls: "turn:turn.example.com", username: "alice", credential: PASSWORD };

test("ICE servers are taken as they are", () => {
  const more = { ...TURN, urls: ["turn:a:3478?transport=tcp", "turns:192.0.2.1:443"] };
  for (const servers of [[], [{ urls: "stun:[2001:db8::1]:3478" }], [TURN, more]]) {
    assert.equal(checkIceServers(servers), servers);
  }
});

const BAD = [
  [{ urls: "stun:a" }, "ICE servers are a list"],
  [[TURN, 5], "ICE server 2 is an object"],
  [["stun:a"], "ICE server 1 is an object"],
  [[{ ...TURN, password: PASSWORD }], "ICE server 1 has a member that is none of urls, username"],
  [[{ username: "alice" }], "ICE server 1 has no urls"],
  [[{ ...TURN, urls: [] }], "ICE server 1 has no urls"],
  [[TURN, { ...TURN, urls: [5] }], "ICE server 2: a URL looks like"],
  [[{ urls: "turn.example.com" }], "ICE server 1: a URL looks like"],
  [[{ ...TURN, urls: "turn://a" }], "ICE server 1: a URL looks like"],
  [[{ ...TURN, urls: "turn:a:0" }], "ICE server 1: a URL looks like"],
  [[{ ...TURN, urls: "turn:a:65536" }], "ICE server 1: a URL looks like"],
  [[{ ...TURN, urls: "turn:a?transport=tls" }], "ICE server 1: a URL looks like"],
  [[{ urls: `turn:alice:${PASSWORD}@a` }], "ICE server 1: a URL looks like"],
  [[{ urls: "turn:a" }], "ICE server 1: a TURN server needs a username"],
  [[{ ...TURN, credential: undefined }], "ICE server 1: a TURN server needs a credential"],
  [[{ ...TURN, credential: "" }], "ICE server 1: its credential is a text"],
];
test("an error says what is wrong with which server, and shows no password", () => {
  for (const [servers, words] of BAD) {
    const isRight = ({ message }) => message.startsWith(words) && !message.includes(PASSWORD);
    assert.throws(() => checkIceServers(servers), isRight, words);
  }
  const make = () => new Connectoid(new MemoryStore(), [], { iceServers: [{ urls: "turn:a" }] });
  assert.throws(make, UsageError);
});

test("a TURN server that refuses the password is told, and others that fail are not", async () => {
  class RefusedConnection extends EventTarget {
    iceGatheringState = "complete";
    localDescription = null;
    createDataChannel() {
      const isReliable = { ordered: true, maxRetransmits: null, maxPacketLifeTime: null };
      return { label: "connectoid", ...isReliable };
    }
    async setLocalDescription() {
      for (const errorCode of [701, 401]) {
        this.onicecandidateerror({ url: "turn:turn.example.com", errorCode });
      }
    }
    close() {}
  }
  const reports = [];
  const adapter = new PeerAdapter(RefusedConnection, async () => {});
  adapter.start((contact, event, attemptId, value) => reports.push([event, value]));
  await adapter.gather(1, 1, null, Promise.resolve({}));
  assert.deepEqual(reports, [
    ["trouble", "turn:turn.example.com cannot be used: it refuses the username or the password."],
    ["gathered", null],
  ]);
});
