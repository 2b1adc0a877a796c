/** The adapter for RTCPeerConnection, with a connection that is none. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { NotConnectedError } from "../errors.js";
import { PeerAdapter } from "../webrtc.js";
import { makeSdp } from "./harness.mjs";

/** A data channel without another end. */
class FakeChannel extends EventTarget {
  constructor(label, kind = {}) {
    super();
    this.label = label;
    this.ordered = true;
    this.maxRetransmits = null;
    this.maxPacketLifeTime = null;
    Object.assign(this, kind);
    this.readyState = "open";
    this.bufferedAmount = 0;
  }

  send() {
    throw new TypeError("RTCDataChannel's largest message is smaller");
  }

  close() {
    this.readyState = "closed";
  }
}

/** A connection that has gathered all there is. */
class FakeConnection {
  constructor() {
    FakeConnection.last = this;
    this.iceGatheringState = "complete";
    this.localDescription = makeSdp("offer");
  }

  createDataChannel(label) {
    this.made = new FakeChannel(label);
    return this.made;
  }

  async setRemoteDescription() {}

  async setLocalDescription() {}

  close() {
    this.isClosed = true;
    if (this.made) this.made.readyState = "closed";
  }
}

/** Return an adapter with a channel that is open, and what it reports from now on. */
async function opened() {
  const reports = [];
  const adapter = new PeerAdapter(FakeConnection, async () => {});
  adapter.start((contact, event) => reports.push(event));
  await adapter.gather(1, 7, null, Promise.resolve({ iceServers: [] }));
  reports.length = 0;
  return { adapter, channel: FakeConnection.last.made, reports };
}

/** Let all go on that waits for nothing. */
const settled = () => new Promise((resolve) => setImmediate(resolve));

for (const offer of [null, makeSdp("offer")]) {
  const side = offer ? "answers" : "offers";
  test(`a side that ${side} has one data channel, and refuses another`, async () => {
    const reports = [];
    const adapter = new PeerAdapter(FakeConnection, async () => {});
    adapter.start((contact, event) => reports.push(event));
    await adapter.gather(1, 1, offer, Promise.resolve({ iceServers: [] }));
    const connection = FakeConnection.last;
    const first = connection.made ?? new FakeChannel("connectoid");
    if (offer) connection.ondatachannel({ channel: first });
    const others = ["connectoid", "another"].map((label) => new FakeChannel(label));
    for (const channel of others) connection.ondatachannel({ channel });
    const told = reports.filter((event) => event === "opened" || event === "refused");
    assert.deepEqual(told, ["opened", "refused", "refused"]);
  });
}

test("a channel that is not ordered and reliable, or has another label, is refused", async () => {
  const odd = [{ ordered: false }, { maxRetransmits: 0 }, { maxPacketLifeTime: 9 }, { label: "x" }];
  for (const kind of odd) {
    const reports = [];
    const adapter = new PeerAdapter(FakeConnection, async () => {});
    adapter.start((contact, event) => reports.push(event));
    await adapter.gather(1, 1, makeSdp("offer"), Promise.resolve({ iceServers: [] }));
    FakeConnection.last.ondatachannel({ channel: new FakeChannel("connectoid", kind) });
    assert.equal(reports.at(-1), "refused");
  }
});

test("a channel that takes no message is told as closed, without the other end", async () => {
  const { adapter, reports } = await opened();
  await assert.rejects(adapter.write(1, 7, "Hello"), NotConnectedError);
  assert.deepEqual(reports, ["closed"]);
});

test("a channel that the other end begins to close is told, however long that takes", async () => {
  const { adapter, channel, reports } = await opened();
  channel.readyState = "closing";
  channel.onclosing();
  assert.deepEqual(reports, ["closed"]);
  await assert.rejects(adapter.write(1, 7, "Hello"), NotConnectedError);
});

/** Begin to send what has no room; return the promise, and a list with what became of it. */
function sendMuch({ adapter, channel }) {
  channel.send = () => {
    channel.bufferedAmount = 2_000_000;
  };
  const outcomes = [];
  const sending = adapter.write(1, 7, "Hello").then(
    () => outcomes.push("sent"), (error) => outcomes.push(error.name));
  return { sending, outcomes };
}

test("whoever waits for room goes on once there is some, or the channel ends", async () => {
  const ends = [
    ["sent", ({ channel }) => channel.onbufferedamountlow()],
    ["NotConnectedError", ({ channel }) => {
      channel.readyState = "closing";
      channel.onclosing();
    }],
    ["NotConnectedError", ({ channel }) => {
      channel.readyState = "closed";
      channel.onclose();
    }],
    // A browser tells nobody of channels whose connection is closed here.
    ["NotConnectedError", ({ adapter }) => adapter.close(1, 7)],
  ];
  for (const [outcome, end] of ends) {
    const one = await opened();
    const { sending, outcomes } = sendMuch(one);
    await Promise.resolve();
    assert.deepEqual(outcomes, []);
    end(one);
    await sending;
    assert.deepEqual(outcomes, [outcome]);
    assert.deepEqual(one.adapter._peers.get(1)?._waiting ?? [], []);
  }
});

test("a connection ends once its channel has closed, or after 5 s", async () => {
  for (const isTimeUp of [false, true]) {
    const passing = [];
    const sleep = (seconds) => new Promise((resolve) => passing.push([seconds, resolve]));
    const adapter = new PeerAdapter(FakeConnection, sleep);
    adapter.start(() => {});
    await adapter.gather(1, 7, null, Promise.resolve({ iceServers: [] }));
    const connection = FakeConnection.last;
    passing.length = 0;
    adapter.close(1, 7);
    // The other end has the channel closed when it has all that was sent.
    assert.equal(connection.made.readyState, "closed");
    await settled();
    assert.equal(connection.isClosed, undefined);
    const [[seconds, end]] = passing;
    assert.equal(seconds, 5);
    if (isTimeUp) end();
    else connection.made.dispatchEvent(new Event("close"));
    await settled();
    assert.equal(connection.isClosed, true);
  }
});

for (const [why, end] of [
  ["the page is left", (adapter) => adapter.stop()],
  ["the other broke the rules", (adapter) => {
    FakeConnection.last.ondatachannel({ channel: new FakeChannel("connectoid") });
    adapter.close(1, 7);
  }],
]) {
  test(`a connection ends at once when ${why}`, async () => {
    const adapter = new PeerAdapter(FakeConnection, async () => {});
    adapter.start(() => {});
    await adapter.gather(1, 7, null, Promise.resolve({ iceServers: [] }));
    end(adapter);
    assert.equal(FakeConnection.last.isClosed, true);
  });
}

/** A browser that refuses what one server has, as browsers do: with all others. */
class StrictConnection extends FakeConnection {
  constructor({ iceServers = [] } = {}) {
    super();
    this.urls = iceServers.flatMap(({ urls }) => urls);
    const isBad = ({ urls, credential }) => (
      [urls].flat().some((url) => !/^(?:stun|turn):[^@]+$/.test(url)
        || (url.startsWith("turn:") && !credential)));
    if (iceServers.some(isBad)) throw new DOMException("bad", "SyntaxError");
  }
}

test("a server that the browser refuses costs a warning and that server alone", async () => {
  const login = { username: "alice", credential: "mellon" };
  const iceServers = [
    { urls: "stun:a" },
    { urls: ["turn:b", "turn:alice:mellon@c", "turn:d"], ...login },
    { urls: "turn:e" },
  ];
  const troubles = [];
  const adapter = new PeerAdapter(StrictConnection, async () => {});
  adapter.start((contact, event, attemptId, value) => {
    if (event === "trouble") troubles.push(value);
  });
  await adapter.gather(1, 1, null, Promise.resolve({ iceServers }));
  assert.deepEqual(FakeConnection.last.urls, ["stun:a", "turn:b", "turn:d"]);
  assert.deepEqual(troubles, [
    "c cannot be used: this browser refuses it.",
    "turn:e cannot be used: this browser refuses it.",
  ]);
});

for (const [iceServers, limitS] of [[[], 20], [[{ urls: "stun:a" }], 2]]) {
  test(`candidates are gathered for ${limitS} s with ${iceServers.length} servers`, async () => {
    class SlowConnection extends FakeConnection {
      constructor() {
        super();
        this.iceGatheringState = "gathering";
      }
    }
    const slept = [];
    const adapter = new PeerAdapter(SlowConnection, async (seconds) => slept.push(seconds));
    adapter.start(() => {});
    await adapter.gather(1, 7, null, Promise.resolve({ iceServers }));
    assert.deepEqual(slept, [limitS]);
  });
}

/** Return a connection that has gathered, what it reports, and what its adapter waits for. */
async function startWaiting() {
  const reports = [];
  const waits = [];
  const sleep = (seconds, signal) => new Promise((resolve) => {
    waits.push([seconds, resolve]);
    signal?.addEventListener("abort", () => resolve());
  });
  const adapter = new PeerAdapter(FakeConnection, sleep);
  adapter.start((contact, event, attemptId) => reports.push([event, attemptId]));
  await adapter.gather(1, 7, null, Promise.resolve({ iceServers: [] }));
  reports.length = waits.length = 0;
  const connection = FakeConnection.last;
  const be = async (state) => {
    connection.connectionState = state;
    connection.onconnectionstatechange();
    await settled();
  };
  return { adapter, be, connection, reports, waits };
}

test("with another network, a connection that is disconnected is told as closed", async () => {
  const { adapter, be, connection, reports, waits } = await startWaiting();
  adapter.doubt();
  assert.deepEqual([reports, waits[0][0]], [[], 15], "it is connected");
  await be("disconnected");
  assert.deepEqual(reports, [["closed", 7]]);
  assert.ok(connection.isClosed);
});

test("once the network is an old one, a connection that is disconnected is silent", async () => {
  const { adapter, be, connection, reports, waits } = await startWaiting();
  adapter.doubt();
  waits[0][1]();
  await settled();
  await be("disconnected");
  assert.deepEqual(reports, [["silent", 7]]);
  assert.ok(!connection.isClosed);
});

test("an end that is missed for too long is told as closed, and the connection ends", async () => {
  const { be, connection, reports, waits } = await startWaiting();
  await be("disconnected");
  const [[seconds, end]] = waits;
  assert.deepEqual([seconds, reports.splice(0)], [3, [["silent", 7]]]);
  end();
  await settled();
  assert.deepEqual(reports, [["closed", 7]]);
  assert.ok(connection.isClosed);
});

test("a connection that is disconnected for now is told as silent, and goes on", async () => {
  const { be, connection, reports, waits } = await startWaiting();
  for (const state of ["disconnected", "connected"]) await be(state);
  waits[0][1]();
  await settled();
  assert.deepEqual(reports.splice(0), [["silent", 7]]);
  assert.ok(!connection.isClosed);
  await be("failed");
  assert.deepEqual(reports, [["closed", 7]]);
});
