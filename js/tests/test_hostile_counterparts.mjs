/** Readers of a link and thieves of a device, against real runners at a real relay. */

import assert from "node:assert/strict";
import { before, test } from "node:test";

import {
  encodeBase64url, parseAddress, prove, readLink, sealMessage, signJws,
} from "../connectoid.js";
import { MAX_CANDIDATES, MAX_SEQ } from "../limits.js";
import { SUITE, TcpAdapter, makeSdp, startApp, startRelay, until } from "./harness.mjs";

const APP = "https://app.example.com/";

let relay = "";
before(async () => {
  relay = await startRelay();
});

/** Return the runners of Alice and Bob, connected, and the link. */
async function startPair() {
  const { app: alice, told } = await startApp(relay);
  const { app: bob } = await startApp(relay);
  const link = await alice.share("Bob", APP);
  await bob.open(link, "Alice");
  await connect(alice, bob);
  await until(() => bob.contacts()[0].state === "paired");
  return { alice, bob, link, told };
}

function connect(alice, bob) {
  const options = { timeoutS: 60 };
  return Promise.all([alice.connect("Bob", options), bob.connect("Alice", options)]);
}

/** Send a message to an address, as anybody can. */
async function post(address, text) {
  for (const { pub } of parseAddress(address, { allowHttp: true })) {
    const data = await sealMessage(SUITE, pub, text);
    const body = JSON.stringify({ pub, ext: null, action: "send", data });
    const response = await fetch(relay, { method: "POST", body });
    assert.deepEqual(await response.json(), { ok: true });
  }
}

test("a thief's largest seq keeps the owner from neither connecting nor unsharing", async () => {
  const { alice, bob, told } = await startPair();
  const [stolen] = bob.contacts();
  const payload = {
    type: "offer",
    to: stolen.contactAddress,
    from: stolen.signer,
    seq: MAX_SEQ - 1,
    re: null,
    connectoid: (stolen.pending ?? stolen.current).address,
    sdpOffer: makeSdp("offer"),
  };
  await post(stolen.contactAddress, await signJws(SUITE, stolen.privateKey, payload));
  const [{ contact }] = alice.roster.all();
  await until(() => contact.dropped.ahead);
  await until(() => told.includes("refused"));
  assert.equal(alice.refusals("Bob").ahead, 1);
  await bob.disconnect("Alice");
  await connect(alice, bob);
  await bob.unshare("Alice");
  await until(() => alice.contacts()[0].state === "ended");
  assert.equal(alice.contacts()[0].why, "unshared");
});

test("a tombstone tells nothing of what is refused", async () => {
  const { alice, bob, told } = await startPair();
  const [stolen] = bob.contacts();
  await bob.close();
  const [{ contact }] = alice.roster.all();
  await alice.unshare("Bob");
  const payload = {
    type: "offer",
    to: stolen.contactAddress,
    from: stolen.signer,
    seq: MAX_SEQ - 1,
    re: null,
    connectoid: (stolen.pending ?? stolen.current).address,
    sdpOffer: makeSdp("offer"),
  };
  await post(stolen.contactAddress, await signJws(SUITE, stolen.privateKey, payload));
  await until(() => contact.dropped.ahead);
  await alice.close();
  assert.ok(!told.includes("refused"));
});

test("a stranger's hellos do not keep the next opener from hearing used", async () => {
  const { link, told } = await startPair();
  const { address, secret } = readLink(link, { allowHttp: true });
  const [key, from] = await SUITE.makeKey("ECDSA");
  const [, pub] = await SUITE.makeKey("ECDH");
  const connectoid = `${pub}.${encodeBase64url(new TextEncoder().encode(relay))}`;
  for (let number = 1; number <= 5; number += 1) {
    const nonce = encodeBase64url(SUITE.random(16));
    const payload = {
      type: "hello", to: address, from, seq: 1, re: null, connectoid, nonce,
      sdpOffer: makeSdp("offer"),
    };
    const jws = await signJws(SUITE, key, payload);
    await post(address, `${jws}.${await prove(secret, jws)}`);
  }
  await until(() => told.includes("opened_twice"));
  const { app: dave, told: toldDave } = await startApp(relay);
  await dave.open(link, "Alice");
  await until(() => toldDave.includes("used"));
});

/** WebRTC that connects by TCP, and counts what it was asked for. */
class CountedAdapter extends TcpAdapter {
  gathered = 0;

  gather(...asked) {
    this.gathered += 1;
    super.gather(...asked);
  }
}

test("a hello of anything but a data channel reaches no WebRTC and changes nothing", async () => {
  const webrtc = new CountedAdapter();
  const { app: alice } = await startApp(relay, { webrtc });
  const link = await alice.share("Bob", APP);
  const { address, secret } = readLink(link, { allowHttp: true });
  const [key, from] = await SUITE.makeKey("ECDSA");
  const [, pub] = await SUITE.makeKey("ECDH");
  const connectoid = `${pub}.${encodeBase64url(new TextEncoder().encode(relay))}`;
  const offer = makeSdp("offer");
  const hostile = [
    `${offer.sdp}m=video 9 UDP/TLS/RTP/SAVPF 96\r\n`,
    `m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n${offer.sdp}`,
    offer.sdp + "a=candidate:1 1 udp 1 192.0.2.1 9 typ host\r\n".repeat(MAX_CANDIDATES + 1),
  ];
  for (const sdp of hostile) {
    const nonce = encodeBase64url(SUITE.random(16));
    const payload = {
      type: "hello", to: address, from, seq: 1, re: null, connectoid, nonce,
      sdpOffer: { ...offer, sdp },
    };
    const jws = await signJws(SUITE, key, payload);
    await post(address, `${jws}.${await prove(secret, jws)}`);
  }
  const [{ contact }] = alice.roster.all();
  await until(() => contact.dropped.sdp === hostile.length);
  assert.equal(webrtc.gathered, 0);
  assert.equal(alice.contacts()[0].state, "invited");
  const { app: bob } = await startApp(relay);
  await bob.open(link, "Alice");
  await connect(alice, bob);
});
