/** Links carry the half of an API key that only sends; the owner keeps the other one. */

import assert from "node:assert/strict";
import test from "node:test";

import { Connectoid, parseAddress, readLink } from "../connectoid.js";
import { OwnKeys } from "../roster.js";
import { MemoryStore, TcpAdapter, Wire, closing, pair, serve, until } from "./harness.mjs";

const extsIn = (address) => parseAddress(address, { allowHttp: true }).map(({ ext }) => ext);

test("an address has the half that sends, and checks have the other", () => {
  const keys = new OwnKeys();
  const relays = [
    ["https://a/", "hers", "sends"], ["https://b/", "one", null], ["https://c/", null],
  ];
  const shown = keys.inAddresses(relays);
  assert.deepEqual(shown, [["https://a/", "sends"], ["https://b/", "one"], ["https://c/", null]]);
  const poll = (url, ext) => ({ mailbox: { pub: "pub", url, ext }, key: "key", at: 7 });
  const asked = shown.map(([url, ext]) => keys.putInto(poll(url, ext)).mailbox.ext);
  assert.deepEqual(asked, ["hers", "one", null]);
  // A mailbox at another relay, or with another key, is asked for as its address says.
  const others = [["https://b/", "sends"], ["https://a/", "other"], ["https://a/", null]];
  for (const [url, ext] of others) {
    assert.equal(keys.putInto(poll(url, ext)).mailbox.ext, ext);
  }
});

test("a key that has got two halves stays here from the next address on", async () => {
  const keys = new OwnKeys();
  keys.inAddresses([["https://a/", "hers", "sends"], ["https://b/", "one"]]);
  const relays = [
    ["https://a/", "hers"], ["https://a/", "other"], ["https://b/", "one"],
    ["https://c/", "hers"], ["https://a/", "sends"], ["https://a/", null],
  ];
  assert.deepEqual(keys.outOfAddresses(relays), [["https://a/", "sends"], ...relays.slice(1)]);
  const wire = new Wire();
  const { alice } = await pair(wire);
  await wire.rounds(4);
  const [[url]] = alice.record.relays;
  alice.machine.asShown = () => [[url, "a half"]];
  wire.nowS += 31 * 86_400;
  await wire.do("Alice", alice.tick(wire.now));
  assert.deepEqual(extsIn(alice.record.pending.address), ["a half"]);
  assert.deepEqual(alice.record.relays, [[url, "a half"]]);
});

test("a link has the half that sends, and the relay is asked with the owner's", async () => {
  const { url, requests } = await serve((response, body) => {
    const asked = body ? JSON.parse(body) : {};
    const nothing = { ok: true, found: false };
    response.end(JSON.stringify(Array.isArray(asked) ? asked.map(() => nothing) : { ok: true }));
  });
  const store = new MemoryStore();
  const relays = [[url, "the owner's half", "the half in links"]];
  const alice = new Connectoid(store, relays, { webrtc: new TcpAdapter() });
  closing.push(() => alice.close());
  await alice.start();
  const link = await alice.share("Bob", "https://app.example/");
  assert.deepEqual(extsIn(readLink(link).address), ["the half in links"]);
  await until(() => requests.some(({ method }) => method === "POST"));
  const checks = requests.filter(({ method }) => method === "POST")
    .flatMap(({ body }) => JSON.parse(body));
  assert.deepEqual(new Set(checks.map(({ ext }) => ext)), new Set(["the owner's half"]));
  // It stands in the app's settings alone.
  assert.ok(!JSON.stringify([...store.records.values()]).includes("the owner's half"));
  assert.deepEqual(alice.relays, relays);
});
