/** One's own SDP before it leaves; what comes from others is in vectors/library/sdp.json. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { UsageError, checkSdp } from "../connectoid.js";
import { MAX_CANDIDATES } from "../limits.js";
import { trimSdp } from "../sdp.js";
import { makeSdp } from "./harness.mjs";

const BASE = makeSdp("offer").sdp;
const TCP = "a=candidate:1 1 tcp 1 192.0.2.1 9 typ host tcptype active\r\n";
const HOST = "a=candidate:1 1 udp 1 192.0.2.1 9 typ host\r\n";
const SEEN = "a=candidate:1 1 udp 1 192.0.2.1 9 typ srflx raddr 0.0.0.0 rport 0\r\n";
const RELAYED = "a=candidate:1 1 udp 1 192.0.2.1 9 typ relay raddr 0.0.0.0 rport 0\r\n";

function count(sdp, line) {
  return sdp.split(line).length - 1;
}

test("one's own candidates within the bound all leave", () => {
  for (const most of [0, 1, MAX_CANDIDATES - 1, MAX_CANDIDATES]) {
    const own = BASE + HOST.repeat(most);
    assert.equal(trimSdp(own), own);
    assert.equal(checkSdp(own), own);
  }
});

test("of one's own candidates over the bound those stay behind that reach least", () => {
  const own = BASE + TCP.repeat(9) + HOST.repeat(MAX_CANDIDATES) + SEEN + SEEN + RELAYED;
  const sent = trimSdp(own);
  const counts = [TCP, HOST, SEEN, RELAYED].map((line) => count(sent, line));
  assert.deepEqual(counts, [0, MAX_CANDIDATES - 3, 2, 1]);
  assert.equal(checkSdp(sent), sent);
});

test("one's own candidates over TCP stay behind, and a contact's are not used", () => {
  const passive = TCP.replace("active", "passive").replace("192.0.2.1", "127.0.0.1");
  const own = BASE + TCP + passive + passive.replace("tcp 1", "TCP 1") + HOST;
  assert.equal(trimSdp(own), BASE + HOST);
  assert.equal(checkSdp(own), BASE + HOST);
});

test("one's own candidates that no contact would take stay behind", () => {
  const bad = HOST.replace(" 1 udp", " 2 udp") + HOST.replace("192.0.2.1", "fe80::1%eth0");
  assert.equal(trimSdp(BASE + bad + HOST), BASE + HOST);
});

test("one's own candidates for which a message has no room stay behind", () => {
  const own = BASE + SEEN + HOST.repeat(8);
  for (const [more, hosts] of [[-1, 7], [0, 8], [1, 8]]) {
    const mostBytes = JSON.stringify(own).length + more;
    assert.equal(trimSdp(own, { mostBytes }), BASE + SEEN + HOST.repeat(hosts));
  }
  assert.equal(trimSdp(own, { mostBytes: 1 }), BASE);
});

test("by relay alone one's own candidates are those of TURN servers", () => {
  const own = BASE + TCP + HOST + SEEN + RELAYED;
  assert.equal(trimSdp(own, { relayOnly: true }), BASE + RELAYED);
});

test("one's own SDP of media is a mistake", () => {
  const own = `${BASE}m=audio 9 UDP/TLS/RTP/SAVPF 111\r\n`;
  assert.throws(() => trimSdp(own), UsageError);
});

test("what is no data channel's is refused by its reason", () => {
  assert.throws(() => checkSdp(BASE.replace("application", "video")), { reason: "sdp" });
});
