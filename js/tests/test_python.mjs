/** With the library in Python on the other side. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { createInterface } from "node:readline";
import { before, test } from "node:test";

import { EMOJI } from "../connectoid.js";
import { here, startApp, startPython, startRelay, until } from "./harness.mjs";

let relay = "";
before(async () => {
  relay = await startRelay();
});

/** Start cross_peer.py; `next(word)` returns the rest of the next line that begins so. */
async function startPeer(...args) {
  const script = here("tests/js/cross_peer.py");
  const peer = await startPython([script, ...args], { stdio: ["pipe", "pipe", "inherit"] });
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

/** Pair with a peer that does `share` or `open`; return it, and its name here. */
async function pairWithPeer(app, role) {
  if (role === "share") {
    const { peer, next } = await startPeer("share", relay);
    await app.open(await next("link"), "Alice");
    return { peer, next, name: "Alice" };
  }
  const link = await app.share("Bob", "https://app.example.com/");
  return { ...await startPeer("open", relay, link), name: "Bob" };
}

for (const role of ["share", "open"]) {
  test(`a contact with Python that did ${role} pairs, talks, renews and parts`, async () => {
    const { app, told } = await startApp(relay);
    const { peer, next, name } = await pairWithPeer(app, role);
    const channel = await app.connect(name, { timeoutS: 40 });
    await channel.send("hello");
    assert.equal(await channel.receive(), "hello");
    await channel.send(Uint8Array.of(1, 2, 255));
    assert.deepEqual(await channel.receive(), Uint8Array.of(1, 2, 255));
    await channel.close();
    const [{ comparison }] = app.contacts();
    const names = comparison.map((number) => EMOJI[number][1]);
    assert.equal(await next("emoji"), names.join(" "));
    assert.equal(await next("state"), "paired");
    await app.renew(name);
    await until(() => told.includes("renewed"));
    peer.stdin.write("renew\n");
    assert.equal(await next("answered"), "True");
    await until(() => told.includes("contact_renewed"));
    peer.stdin.write("unshare\n");
    await until(() => told.includes("unshared"));
    peer.stdin.write("end\n");
    await once(peer, "exit");
  });
}
