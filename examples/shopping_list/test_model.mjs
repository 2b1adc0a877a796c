/** Run the rules of model.js on their own: `node --test examples/shopping_list/test_model.mjs`. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { FullError, MAX_AT, MAX_ITEMS, Model, isNewer, readMessage, tidy, writeChanges } from "./model.js";

const START = 1_800_000_000_000;

/** A device with a clock to turn. */
function makeDevice(name, at = START) {
  const clock = { at };
  let made = 0;
  const model = new Model({ device: `device-${name}`, now: () => clock.at, makeId: () => `${name}${(made += 1)}` });
  return { model, clock };
}

const everything = (model) => model.allOf(model.lists.keys());

/** Both say all they know. */
function exchange(one, other) {
  const [first, second] = [everything(one), everything(other)];
  one.merge(second);
  other.merge(first);
}

const sorted = (model) => [...model.lists.values(), ...model.items.values()].sort((a, b) => (a.id < b.id ? -1 : 1));

test("the later change wins on both sides", () => {
  const [alice, bob] = [makeDevice("alice"), makeDevice("bob")];
  const list = alice.model.addList("Groceries");
  const item = alice.model.addItem(list.id, "Milk", "1");
  exchange(alice.model, bob.model);
  alice.clock.at += 10;
  alice.model.changeItem(item.id, { quantity: "2" });
  bob.clock.at += 20;
  bob.model.changeItem(item.id, { quantity: "3" });
  exchange(alice.model, bob.model);
  assert.equal(alice.model.items.get(item.id).quantity, "3");
  assert.deepEqual(sorted(alice.model), sorted(bob.model));
});

test("changes of the same millisecond end the same on both sides", () => {
  const [alice, bob] = [makeDevice("alice"), makeDevice("bob")];
  const list = alice.model.addList("Groceries");
  exchange(alice.model, bob.model);
  alice.model.changeList(list.id, { name: "Market" });
  bob.model.changeList(list.id, { name: "Shop" });
  assert.equal(alice.model.lists.get(list.id).updatedAt, bob.model.lists.get(list.id).updatedAt);
  exchange(alice.model, bob.model);
  assert.equal(alice.model.lists.get(list.id).name, "Shop");
  assert.deepEqual(sorted(alice.model), sorted(bob.model));
});

test("what was deleted stays so when an older version comes", () => {
  const [alice, bob] = [makeDevice("alice"), makeDevice("bob")];
  const list = alice.model.addList("Groceries");
  const item = alice.model.addItem(list.id, "Milk", "");
  exchange(alice.model, bob.model);
  alice.model.changeItem(item.id, { deleted: true });
  exchange(alice.model, bob.model);
  assert.deepEqual(bob.model.itemsOf(list.id), []);
  alice.model.merge({ lists: [], items: [item] });
  assert.deepEqual(alice.model.itemsOf(list.id), []);
});

test("a user's change is newer than what he saw, also with a clock that is slow or went back", () => {
  const [alice, bob] = [makeDevice("alice"), makeDevice("bob", START - 86_400_000)];
  const list = alice.model.addList("Groceries");
  exchange(alice.model, bob.model);
  const renamed = bob.model.changeList(list.id, { name: "Market" });
  assert.ok(isNewer(renamed, list));
  bob.clock.at -= 1_000;
  assert.ok(isNewer(bob.model.changeList(list.id, { name: "Shop" }), renamed));
});

test("a record from far ahead does not take the others along", () => {
  const { model } = makeDevice("alice");
  const list = model.addList("Groceries");
  model.merge({ lists: [], items: [{ ...model.addItem(list.id, "Milk", ""), updatedAt: MAX_AT, by: "device-eve" }] });
  const [item] = model.itemsOf(list.id);
  assert.equal(model.changeItem(item.id, { done: true }).updatedAt, MAX_AT);
  assert.ok(model.addItem(list.id, "Bread", "").updatedAt < START + 100);
});

test("random changes on three devices converge, whatever the order of syncs", () => {
  for (let seed = 1; seed <= 200; seed += 1) {
    let state = seed;
    const random = (count) => { state = (state * 48_271) % 2_147_483_647; return state % count; };
    const devices = ["alice", "bob", "carol"].map((name) => makeDevice(name, START + random(100_000)));
    devices[0].model.addList("Groceries");
    for (let step = 0; step < 60; step += 1) {
      const { model, clock } = devices[random(3)];
      clock.at += random(3) - 1;
      const [list, item] = [[...model.lists.values()][0], [...model.items.values()][random(5)]];
      const change = [
        () => list && model.addItem(list.id, `thing ${step}`, ""),
        () => item && model.changeItem(item.id, { done: random(2) === 1, deleted: random(3) === 0 }),
        () => list && model.changeList(list.id, { name: `list ${step}`, deleted: random(4) === 0 }),
        () => exchange(model, devices[random(3)].model),
      ];
      change[random(4)]();
    }
    for (const [one, other] of [[0, 1], [1, 2], [0, 1]]) exchange(devices[one].model, devices[other].model);
    assert.deepEqual(sorted(devices[0].model), sorted(devices[1].model), `seed ${seed}`);
    assert.deepEqual(sorted(devices[0].model), sorted(devices[2].model), `seed ${seed}`);
  }
});

test("a contact writes only to the lists that are shared with it", () => {
  const { model } = makeDevice("alice");
  const [open, secret] = [model.addList("Groceries"), model.addList("Presents")];
  const item = model.addItem(secret.id, "Ring", "");
  const later = { updatedAt: START + 1_000, by: "device-eve" };
  const came = model.merge({
    lists: [{ ...secret, ...later, name: "Taken" }, { ...open, ...later, name: "Market" }],
    items: [{ ...item, ...later, text: "Nothing" }, { ...item, ...later, list: open.id }, { ...item, ...later, list: "unknown-list" }],
  }, (list) => list === open.id);
  assert.deepEqual(came.lists.map(({ name }) => name), ["Market"]);
  assert.deepEqual(came.items, []); // an item never moves to another list
  assert.equal(model.items.get(item.id).text, "Ring");
});

test("a full list takes no more, from nobody", () => {
  const { model } = makeDevice("alice");
  const list = model.addList("Groceries");
  const template = model.addItem(list.id, "Milk", "");
  const many = Array.from({ length: MAX_ITEMS + 10 }, (_, place) => ({ ...template, id: `from-eve-${place}` }));
  assert.equal(model.merge({ lists: [], items: many }).items.length, MAX_ITEMS - 1);
  assert.throws(() => model.addItem(list.id, "Bread", ""), FullError);
});

test("tombstones go after a year", () => {
  const { model, clock } = makeDevice("alice");
  const list = model.addList("Groceries");
  model.changeItem(model.addItem(list.id, "Milk", "").id, { deleted: true });
  assert.equal(model.purge().length, 0);
  clock.at += 366 * 86_400_000;
  assert.equal(model.purge().length, 1);
  assert.equal(model.items.size, 0);
});

test("many items go into messages that a channel carries, and come out the same", () => {
  const { model } = makeDevice("alice");
  const list = model.addList("Groceries");
  for (let count = 0; count < MAX_ITEMS; count += 1) model.addItem(list.id, "🥕".repeat(50 + count % 150), "1 kg");
  const texts = writeChanges(everything(model)).map((part) => JSON.stringify({ type: "changes", number: 1, ...part }));
  assert.ok(texts.every((text) => new TextEncoder().encode(text).length < 65_536));
  const other = makeDevice("bob").model;
  for (const text of texts) other.merge(readMessage(text));
  assert.deepEqual(sorted(other), sorted(model));
});

test("typed text is kept without what cannot be seen", () => {
  assert.equal(tidy("  Olive \u202e oil\n\u0007 ", 200), "Olive oil");
  assert.equal(tidy("🥕🥕🥕", 2), "🥕🥕");
  assert.equal(tidy(" \t ", 20), "");
});
