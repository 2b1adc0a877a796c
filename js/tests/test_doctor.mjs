/** The doctor of a page: what it finds, with a WebRTC that gathers what a test says. */

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { test } from "node:test";

import { CONTEXTS, FINDINGS, encodeBase64url, examine } from "../connectoid.js";
import { conclude } from "../doctor.js";
import { kindOf, oneByOne, stunOf } from "../probes.js";
import { SUITE, here } from "./harness.mjs";

const RELAY = "https://relay.example.com/";
const NOW = { wallUs: 1_800_000_000_000_000, monotonicS: 1 };
const LOGIN = { username: "alice", credential: "mellon" };

/**
 * Return RTCPeerConnection in a network where `gathers(url)` says what each server brings:
 * candidates as their texts, the code of an error, or "refused"; undefined is silence.
 */
function webrtcWhere(gathers) {
  return class {
    constructor({ iceServers, iceTransportPolicy }) {
      this._urls = iceServers.flatMap(({ urls }) => urls);
      this._brings = this._urls.map((url) => gathers(url, this._urls));
      if (this._brings.includes("refused")) throw new DOMException("bad", "SyntaxError");
      this._hosts = iceTransportPolicy === "relay" ? [] : [HOST];
      this.iceGatheringState = "new";
    }

    createDataChannel() {}

    async setLocalDescription() {
      setImmediate(() => this._gather());
    }

    _gather() {
      for (const candidate of [...this._hosts, ...this._brings.flat()]) {
        if (typeof candidate === "string") this.onicecandidate({ candidate: { candidate } });
      }
      for (const errorCode of this._brings) {
        if (Number.isInteger(errorCode)) {
          this.onicecandidateerror({ errorCode, address: "192.168.1.x" });
        }
      }
      if (this._brings.includes(undefined)) return;
      this.onicecandidate({ candidate: null });
      this.iceGatheringState = "complete";
      this.onicegatheringstatechange?.();
    }

    close() {
      this.isClosed = true;
    }
  };
}

const HOST = "candidate:1 1 udp 2122 3f2b.local 40000 typ host generation 0";

/** Return a candidate as which a STUN server sees a hidden socket. */
function seen(port, address = "203.0.113.9", foundation = 2) {
  return `candidate:${foundation} 1 udp 1677 ${address} ${port} typ srflx raddr 0.0.0.0 rport 0`;
}

const RELAYED = "candidate:3 1 udp 41 198.51.100.7 50000 typ relay raddr 0.0.0.0 rport 0";

/** Return `fetch` of a relay which is as its document says, and lends `turn`. */
function relayFetch(document, turn) {
  return async (url, { body }) => {
    const request = body ? JSON.parse(body) : null;
    const reply = request ? { ok: true, found: false } : document;
    if (request?.prove) {
      const sealed = await SUITE.seal(
        request.pub, CONTEXTS.question, new TextEncoder().encode("answer"));
      reply.question = encodeBase64url(sealed);
    }
    if (request?.turn) reply.turn = turn;
    return Response.json(reply);
  };
}

/** Return what is found, without what is asked: names, and of what. */
async function find(patient, instruments = {}) {
  const found = [];
  const page = {};
  const sleep = (seconds, signal) => new Promise((resolve) => {
    const timer = setTimeout(resolve, 100 * seconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve();
    });
  });
  const all = {
    suite: SUITE, page, now: () => NOW, sleep, fetch: relayFetch({}), ...instruments,
  };
  for await (const finding of examine(patient, all)) {
    assert.equal(finding.state, FINDINGS[finding.found], finding.found);
    if (finding.state !== "ask") found.push(finding);
  }
  return found;
}

/** Return findings as short as they can be. */
function short(found) {
  return found.map(({ found: name, about }) => (about ? `${name} ${about}` : name));
}

const DOCUMENT = { stun: true, turn: true };
const LENT = { urls: ["turn:turn.example.com"], ...LOGIN, ttl: 100 };

test("a relay, its servers and the ways are told one by one, and what follows", async () => {
  const PeerConnection = webrtcWhere((url) => {
    if (url === "turn:turn.example.com") return [RELAYED];
    return url === "turns:other.example.com" ? 401 : [seen(40_000)];
  });
  const iceServers = [{ urls: "turns:other.example.com", ...LOGIN }];
  const patient = { relays: [RELAY], iceServers };
  const found = await find(patient, { PeerConnection, fetch: relayFetch(DOCUMENT, LENT) });
  assert.deepEqual(short(found), [
    `relay_answers ${RELAY}`,
    `relay_lends_turn ${RELAY}`,
    "stun_answers stun:relay.example.com:443",
    "way_one_port IPv4",
    "turn_relays turn:turn.example.com",
    "turn_login turns:other.example.com",
    "all_with_turn",
  ]);
  assert.deepEqual(found[2].seen, ["203.0.113.9"]);
});

/** Return how servers of two hosts see a device, as the ways say it. */
async function ways(gathers) {
  const iceServers = [{ urls: ["stun:a.example", "stun:b.example"] }];
  const PeerConnection = webrtcWhere(gathers);
  const found = await find({ relays: [RELAY], iceServers }, { PeerConnection });
  return short(found).filter((name) => /^(?:way|stun|all)_/.test(name));
}

const ANSWER = ["stun_answers stun:a.example", "stun_answers stun:b.example"];
const WAYS = {
  "another port for each": [(url) => [seen(url === "stun:a.example" ? 1 : 2)],
    [...ANSWER, "way_symmetric IPv4"]],
  "one port for all": [() => [seen(1)], [...ANSWER, "way_one_port IPv4"]],
  "one address of each kind": [() => [seen(1), seen(1, "2001:db8::9", 4)],
    [...ANSWER, "way_one_port IPv4", "way_one_port IPv6"]],
  "an answer of one alone": [(url) => (url === "stun:a.example" ? [seen(1)] : 701),
    [ANSWER[0], "stun_silent stun:b.example", "way_some_nat IPv4"]],
  "an answer that gets lost": [
    (url, all) => (all.length > 1 && url === "stun:b.example" ? undefined : [seen(1)]),
    [...ANSWER, "way_some_nat IPv4"]],
  "an error that only comes with both": [
    (url, all) => (all.length > 1 && url === "stun:b.example" ? 701 : [seen(1)]),
    [...ANSWER, "way_some_nat IPv4"]],
  "no answer": [() => undefined,
    ["stun_silent stun:a.example", "stun_silent stun:b.example", "way_silent", "all_without_way"]],
  "a browser that refuses them": [() => "refused",
    ["stun_refused stun:a.example", "stun_refused stun:b.example", "way_silent",
      "all_without_way"]],
};
for (const [name, [gathers, expected]] of Object.entries(WAYS)) {
  test(`the way out is told as far as it is known: ${name}`, async () => {
    assert.deepEqual(await ways(gathers), expected);
  });
}

const SOCKET = { type: "srflx", protocol: "udp", address: "203.0.113.9", foundation: "1" };
const HOSTS = [
  { type: "host", protocol: "udp", address: "a.local", port: "1", socket: "", foundation: "2" },
  { type: "host", protocol: "udp", address: "b.local", port: "1", socket: "", foundation: "3" },
];

test("several hidden sockets are not taken for one with several ports", () => {
  const kind = (...candidates) => kindOf(
    { candidates, errors: [], isRefused: false, isComplete: true }, "IPv4", 2);
  const at = (port, socket, foundation = "1") => ({ ...SOCKET, port, socket, foundation });
  assert.equal(kind(...HOSTS, at("1", "", "1"), at("2", "", "4")), "some_nat");
  // Of one foundation, it is one socket; and so it is where there is but one.
  assert.equal(kind(...HOSTS, at("1", ""), at("2", "")), "symmetric");
  assert.equal(kind(HOSTS[0], at("1", "", "1"), at("2", "", "4")), "symmetric");
  // Each of two interfaces has a port, and the best of them counts.
  assert.equal(kind(...HOSTS, at("1", "10.0.0.1 1"), at("2", "10.0.0.2 1")), "one_port");
  assert.equal(kind(...HOSTS, at("1", "10.0.0.1 1"), at("2", "10.0.0.1 1")), "symmetric");
});

test("a device that is seen under its own address is open", () => {
  const own = { ...HOSTS[0], address: "198.51.100.5" };
  const gathered = { candidates: [own], errors: [], isRefused: false, isComplete: true };
  assert.equal(kindOf(gathered, "IPv4", 0), "open");
  assert.equal(kindOf({ ...gathered, isComplete: false }, "IPv4", 0), "unasked");
  const silent = { ...gathered, errors: [{ code: 701, family: "" }] };
  assert.equal(kindOf(silent, "IPv4", 0), "unasked");
  const srflx = { ...SOCKET, address: own.address, port: "1", socket: "" };
  assert.equal(kindOf({ ...gathered, candidates: [own, srflx] }, "IPv4", 1), "open");
});

test("a server in the network of this device says nothing of ways out", async () => {
  const iceServers = [{ urls: "stun:192.168.1.1" }];
  const PeerConnection = webrtcWhere(() => [seen(1, "192.168.1.5")]);
  const found = await find({ relays: [RELAY], iceServers }, { PeerConnection });
  assert.deepEqual(short(found).slice(1), ["stun_near stun:192.168.1.1", "all_without_stun"]);
});

test("who connects by relay alone has no STUN server asked", async () => {
  const asked = [];
  const PeerConnection = webrtcWhere((url) => {
    asked.push(url);
    return 701;
  });
  const iceServers = [{ urls: "stun:a.example" }, { urls: "turn:b.example", ...LOGIN }];
  const found = await find({ relays: [RELAY], iceServers, relayOnly: true }, { PeerConnection });
  assert.deepEqual(short(found).slice(1), ["turn_silent turn:b.example", "all_without_turn"]);
  assert.deepEqual(asked, ["turn:b.example"]);
});

test("a TURN server over UDP is asked for STUN too, once", () => {
  assert.equal(stunOf("turn:a:3478"), "stun:a:3478");
  assert.equal(stunOf("turn:a?transport=udp"), "stun:a");
  assert.equal(stunOf("stuns:a"), "stuns:a");
  for (const url of ["turn:a?transport=tcp", "turns:a"]) assert.equal(stunOf(url), "");
  const again = { urls: "turn:a", ...LOGIN };
  const servers = oneByOne([{ urls: ["turn:a", "turn:b"], ...LOGIN }, again]);
  assert.deepEqual(servers.map(({ urls }) => urls), ["turn:a", "turn:b"]);
});

// -- Relays ------------------------------------------------------------------------------

const PAGE = { location: { protocol: "https:" } };

/** Return how a relay is found by a `fetch`. */
async function findRelay(fetch, more = {}) {
  const found = await find({ relays: [more.url ?? RELAY] }, { fetch, ...more });
  return found.filter(({ about }) => about);
}

test("a relay that fails is told by what is known of it", async () => {
  const failing = async (url, { mode }) => {
    if (mode !== "no-cors") throw new TypeError("Failed to fetch");
    return { type: "opaque" };
  };
  const cases = {
    relay_unreachable: async () => {
      throw new TypeError("Failed to fetch");
    },
    relay_hidden: failing,
    relay_wrong: async () => new Response("<!doctype html>"),
    relay_refused: async () => Response.json({ ok: false, error: "TooMany", detail: "Later." }),
    relay_takes_no_check: async (url, { body }) => (
      Response.json(body ? { ok: false, error: "NoKey" } : {})),
  };
  for (const [name, fetch] of Object.entries(cases)) {
    const [finding] = (await findRelay(fetch)).filter(({ state }) => state === "bad");
    assert.equal(finding.found, name);
  }
  const found = await find({ relays: [RELAY] }, { fetch: failing });
  assert.equal(found.at(-2).found, "all_without_relay");
});

test("a page over https asks no relay over http, but on this machine", async () => {
  const insecure = { page: PAGE, url: "http://relay.example.com/" };
  const local = { page: PAGE, url: "http://localhost:8080/" };
  for (const [more, found] of [[insecure, "relay_insecure"], [local, "relay_answers"]]) {
    const [first] = await findRelay(relayFetch({}), more);
    assert.equal(first.found, found);
  }
});

test("a clock is compared where the page may read that of a server: N-1, N, N+1", async () => {
  for (const [s, isOdd] of [[299, false], [300, false], [301, true], [-301, true]]) {
    const fetch = async () => {
      const date = new Date(NOW.wallUs / 1_000 + 1_000 * s).toUTCString();
      return Response.json({ ok: true }, { headers: { Date: date } });
    };
    const odd = (await findRelay(fetch)).filter(({ found }) => found === "clock_differs");
    assert.deepEqual(odd.map((finding) => finding.s), isOdd ? [s] : []);
  }
  const unset = await find({ relays: [] }, { now: () => ({ wallUs: 1, monotonicS: 1 }) });
  assert.equal(unset[0].found, "clock_not_set");
});

test("a relay that says it lends TURN, and does not, is told", async () => {
  const found = await findRelay(relayFetch(DOCUMENT, { urls: [] }));
  assert.ok(short(found).includes(`relay_lends_no_turn ${RELAY}`));
  const nothing = await findRelay(relayFetch(DOCUMENT, undefined));
  assert.ok(!short(nothing).some((name) => name.startsWith("relay_lends")));
});

test("a server that is silent holds the doctor up no longer than its time", async () => {
  const iceServers = [{ urls: ["stun:a.example", "turn:b.example"], ...LOGIN }];
  const fetch = (url, { signal }) => new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => reject(signal.reason));
  });
  const PeerConnection = webrtcWhere(() => undefined);
  const found = await find({ relays: [RELAY], iceServers }, { PeerConnection, fetch });
  assert.deepEqual(short(found), [
    `relay_unreachable ${RELAY}`, "stun_silent stun:a.example", "way_silent",
    "turn_silent turn:b.example", "all_without_relay", "all_without_way",
  ]);
});

test("who ends it early gets no finding more, and nothing goes on", async () => {
  const ending = new AbortController();
  let isAborted = false;
  const fetch = (url, { signal }) => new Promise((resolve, reject) => {
    signal.addEventListener("abort", () => {
      isAborted = true;
      reject(signal.reason);
    });
    ending.abort();
  });
  assert.deepEqual(await find({ relays: [RELAY] }, { fetch, signal: ending.signal }), []);
  assert.ok(isAborted);
});

test("without WebRTC it is said, and a device that is offline too", async () => {
  const page = { navigator: { onLine: false } };
  const found = await find({ relays: [RELAY] }, { page });
  assert.deepEqual(short(found), [
    "offline", `relay_answers ${RELAY}`, "webrtc_missing", "all_without_stun"]);
});

test("what follows is what is known", () => {
  const known = { hasRelay: true, hasTurn: false, relayOnly: false };
  const all = (ways_, more = {}) => (
    [...conclude(ways_, { ...known, ...more })].map(({ found }) => found));
  assert.deepEqual(all({ IPv4: "one_port", IPv6: "unasked" }), []);
  assert.deepEqual(all({ IPv4: "silent", IPv6: "unasked" }), ["all_without_way"]);
  assert.deepEqual(all({ IPv4: "silent", IPv6: "open" }), []);
  assert.deepEqual(all({ IPv4: "unasked", IPv6: "unasked" }), ["all_without_stun"]);
  assert.deepEqual(all({ IPv4: "silent", IPv6: "unasked" }, { hasTurn: true }), ["all_with_turn"]);
});

test("the shopping list has words for every finding", async () => {
  const { wordsOfFinding } = await import(here("examples/shopping_list/words.js"));
  for (const [found, state] of Object.entries(FINDINGS)) {
    const more = { about: "stun:a", why: "Because.", ms: 1, s: 400, code: 5, seen: ["a"] };
    const words = wordsOfFinding({ found, state, ...more });
    assert.ok(/[.…]$/.test(words) && !/undefined|NaN/.test(words), `${found}: ${words}`);
  }
  const page = await readFile(here("examples/shopping_list/index.html"), "utf8");
  assert.ok(page.includes('id="check-dialog"'));
});
