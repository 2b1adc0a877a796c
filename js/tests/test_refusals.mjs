/** What is refused is counted by reason, and told; a flood of it costs little. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { REASONS, ROUTINE } from "../errors.js";
import { TELL_EVERY_S } from "../limits.js";
import { Refusals, WRITTEN_EVERY_S } from "../refusals.js";
import { MemoryStore, RELAYS, startApp } from "./harness.mjs";

test("every reason is counted and told, but what is routine is only counted", () => {
  for (const reason of Object.keys(REASONS)) {
    const refusals = new Refusals();
    assert.equal(refusals.note({ dropped: { [reason]: 2 } }, 0), !ROUTINE.includes(reason));
    assert.deepEqual(refusals.counts, { [reason]: 2 });
  }
});

test("a flood of refusals costs an event for each reason", () => {
  const refusals = new Refusals();
  const machine = { dropped: {} };
  let told = 0;
  for (let number = 1; number <= 5_000; number += 1) {
    for (const reason of Object.keys(REASONS)) machine.dropped[reason] = number;
    told += Number(refusals.note(machine, number / 100));
  }
  // All reasons were new in the first step.
  assert.equal(told, 1);
  assert.ok(Object.values(refusals.counts).every((count) => count === 5_000));
});

test("a reason is told again after an hour, another one at once", () => {
  for (const [afterS, isTold] of [[-1, false], [0, true], [1, true]]) {
    const refusals = new Refusals();
    const machine = { dropped: { ahead: 1 } };
    assert.ok(refusals.note(machine, 0));
    machine.dropped.sdp = 1;
    assert.ok(refusals.note(machine, 1));
    machine.dropped.ahead += 1;
    assert.equal(refusals.note(machine, TELL_EVERY_S + afterS), isTold);
    assert.ok(!refusals.note(machine, TELL_EVERY_S + afterS));
  }
});

test("a machine that was made anew goes on counting", () => {
  const refusals = new Refusals();
  refusals.note({ dropped: { sdp: 3 } }, 0);
  refusals.note({ dropped: { sdp: 2 } }, 1);
  assert.deepEqual(refusals.counts, { sdp: 5 });
});

test("counts are written once a minute, and begin with those of earlier pages", () => {
  for (const [afterS, isToWrite] of [[-1, false], [0, true], [1, true]]) {
    const refusals = new Refusals({ sdp: 4 });
    assert.ok(!refusals.isToWrite(0));
    const machine = { dropped: { sdp: 1 } };
    refusals.note(machine, 0);
    assert.ok(refusals.isToWrite(0));
    machine.dropped.sdp = 2;
    refusals.note(machine, 1);
    assert.equal(refusals.isToWrite(WRITTEN_EVERY_S + afterS), isToWrite);
    assert.deepEqual(refusals.counts, { sdp: 6 });
  }
});

test("a page that is loaded again knows what was refused before, and a full disk costs that alone",
  async () => {
    const store = new MemoryStore();
    const problems = [];
    const onProblem = ({ message }) => problems.push(message);
    const { app } = await startApp(RELAYS[0][0], { store, onProblem });
    await app.share("Bob", "https://app.example.com/");
    const [{ contact }] = app.roster.all();
    const [{ pub }] = contact.mailboxes;
    await app.take(1, new Map([[pub, [[1, "="], [2, "=="]]]]));
    assert.deepEqual([...store.refusals], [[1, { encoding: 2 }]]);
    await app.take(1, new Map([[pub, [[3, "==="]]]]));
    await app.close();
    const { app: again } = await startApp(RELAYS[0][0], { store, onProblem });
    assert.deepEqual(again.refusals("Bob"), { encoding: 3 });
    store.saveRefusals = () => Promise.reject(new Error("full"));
    const [{ contact: later }] = again.roster.all();
    await again.take(1, new Map([[later.mailboxes[0].pub, [[4, "===="]]]]));
    assert.deepEqual(again.refusals("Bob"), { encoding: 4 });
    assert.ok(problems.includes("full"));
  });
