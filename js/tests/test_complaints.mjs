/** Complaints: each is told once, until what it is about has gone well again. */

import assert from "node:assert/strict";
import { before, test } from "node:test";

import { Complaints, MAX_COMPLAINTS, MAX_TOLD, TOLD_MS } from "../complaints.js";
import { serve, startApp, startRelay, until } from "./harness.mjs";

const APP = "https://app.example.com/";
const SOON = { timeoutS: 120 };

let relay = "";
before(async () => {
  relay = await startRelay();
});

/** Return complaints, and what was told. */
function start(nowMs) {
  const told = [];
  return [new Complaints(({ message }) => told.push(message), nowMs), told];
}

test("a complaint is told once, until what it is about has gone well", async () => {
  const [complaints, told] = start();
  const dead = new Error("dead");
  complaints.make(dead, 1);
  complaints.make(dead, 1);
  complaints.clear(2);
  complaints.make(dead, 1);
  // Others have the same trouble, and one of them has it no longer.
  complaints.make(dead, 2);
  complaints.clear(2);
  complaints.make(dead, 1);
  await until(() => told.length);
  assert.deepEqual(told, ["dead"]);
  complaints.clear(1);
  complaints.make(dead, 1);
  await until(() => told.length === 2);
});

test("a hundred complaints about one relay are remembered", async () => {
  for (const [others, times] of [[-2, 1], [-1, 1], [0, 2]]) {
    let nowMs = 0;
    const [complaints, told] = start(() => nowMs);
    complaints.make(new Error("dead"), 1);
    for (let number = 0; number < MAX_COMPLAINTS + others; number += 1) {
      nowMs += TOLD_MS;
      complaints.make(new Error(`${number}`), 1);
    }
    nowMs += TOLD_MS;
    complaints.make(new Error("dead"), 1);
    await until(() => told.length >= MAX_COMPLAINTS + others + times);
    assert.equal(told.filter((text) => text === "dead").length, times);
  }
});

test("of ever new words about one relay ten are told in an hour", async () => {
  let nowMs = 0;
  const [complaints, told] = start(() => nowMs);
  for (let number = 0; number <= MAX_TOLD; number += 1) complaints.make(new Error(`${number}`), 1);
  complaints.make(new Error("another relay"), 2);
  nowMs = TOLD_MS;
  complaints.make(new Error("an hour later"), 1);
  await until(() => told.includes("an hour later"));
  const first = Array.from({ length: MAX_TOLD }, (_, number) => `${number}`);
  assert.deepEqual(told, [...first, "another relay", "an hour later"]);
  assert.equal(complaints.latest((about) => about === 1), "an hour later");
});

test("complaints about the latest hundred are remembered", async () => {
  for (const [others, times] of [[-2, 1], [-1, 1], [0, 2]]) {
    const [complaints, told] = start();
    complaints.make(new Error("dead"), 0);
    for (let number = 1; number <= MAX_COMPLAINTS + others; number += 1) {
      complaints.make(new Error(`${number}`), number);
    }
    complaints.make(new Error("dead"), 0);
    await until(() => told.length >= MAX_COMPLAINTS + others + times);
    assert.equal(told.filter((text) => text === "dead").length, times);
  }
});

test("a relay that answers does not have the trouble of another one told again", async () => {
  const { url: dead, requests } = await serve((response) => response.end("no relay"));
  const problems = [];
  const onProblem = ({ message }) => problems.push(message);
  const { app: alice } = await startApp(relay, { onProblem });
  alice.relays = [relay, dead];
  const { app: bob } = await startApp(relay, { allowPrivateRelays: true });
  await bob.open(await alice.share("Bob", APP), "Alice");
  await Promise.all([alice.connect("Bob", SOON), bob.connect("Alice", SOON)]);
  const isHers = ({ body }) => body.startsWith("[");
  const checks = requests.filter(isHers).length;
  await until(() => requests.filter(isHers).length > checks + 1);
  const told = problems.filter((text) => text.startsWith(dead));
  assert.deepEqual(told, [...new Set(told)]);
});
