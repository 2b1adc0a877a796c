/** The rules of model.js on their own: `node --test tests/js/test_model.mjs`. */

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  FullError,
  GoneError,
  MAX_AHEAD_MS,
  MAX_AT,
  MAX_BYTES_OF_CONTACT,
  MAX_ITEMS,
  MAX_ITEMS_OF_CONTACT,
  MAX_LEVELS,
  MAX_LISTS,
  MAX_LISTS_OF_CONTACT,
  Model,
  isNewer,
  readMessage,
  tidy,
  writeChanges,
} from "../../examples/shopping_list/model.js";
import { Keeper } from "../../examples/shopping_list/db.js";
import { Sync } from "../../examples/shopping_list/sync.js";
import { paced } from "../../examples/shopping_list/ui.js";
import { standingOf } from "../../examples/shopping_list/words.js";
import { RelayError } from "../../js/connectoid.js";

const START = 1_800_000_000_000;

/** A device with a clock to turn. */
function makeDevice(name, at = START) {
  const clock = { at };
  let made = 0;
  const model = new Model({
    device: `device-${name}`,
    now: () => clock.at,
    makeId: () => `${name}${(made += 1)}`,
  });
  return { model, clock };
}

const everything = (model) => model.allOf(model.lists.keys());

/** Both say all they know. */
function exchange(one, other) {
  const [first, second] = [everything(one), everything(other)];
  one.merge(second);
  other.merge(first);
}

const sorted = (model) =>
  [...model.lists.values(), ...model.items.values()].sort((a, b) => (a.id < b.id ? -1 : 1));

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

test("a user's change is newer than what he saw, whatever his clock says", () => {
  const [alice, bob] = [makeDevice("alice"), makeDevice("bob", START - 86_400_000)];
  const list = alice.model.addList("Groceries");
  exchange(alice.model, bob.model);
  const renamed = bob.model.changeList(list.id, { name: "Market" });
  assert.ok(isNewer(renamed, list));
  bob.clock.at -= 1_000;
  assert.ok(isNewer(bob.model.changeList(list.id, { name: "Shop" }), renamed));
});

test("a time is taken up to a day ahead, and changes nothing beyond", () => {
  for (const [aheadMs, isTaken] of [
    [MAX_AHEAD_MS - 1, true],
    [MAX_AHEAD_MS, true],
    [MAX_AHEAD_MS + 1, false],
    [MAX_AT - START, false],
  ]) {
    const { model } = makeDevice("alice");
    const list = model.addList("Groceries");
    const item = model.addItem(list.id, "Milk", "");
    const from = { updatedAt: START + aheadMs, by: "device-eve" };
    model.merge({
      lists: [{ ...list, ...from, name: "Eve's" }],
      items: [{ ...item, ...from, deleted: true }],
    });
    assert.equal(model.lists.get(list.id).name, isTaken ? "Eve's" : "Groceries");
    assert.equal(model.items.get(item.id).deleted, isTaken);
    // Whatever came, the users have the last word, and the others are not taken along.
    const changed = model.changeItem(item.id, { deleted: false });
    assert.ok(changed.updatedAt <= START + MAX_AHEAD_MS + 1);
    assert.ok(model.addItem(list.id, "Bread", "").updatedAt < START + 100);
  }
});

test("what is new and far ahead gets the present time, so that everybody can change it", () => {
  const [alice, bob, carol] = ["alice", "bob", "carol"].map((name) => makeDevice(name));
  const list = alice.model.addList("Groceries");
  const item = { ...alice.model.addItem(list.id, "Milk", ""), id: "poisoned", updatedAt: MAX_AT };
  exchange(alice.model, bob.model);
  const [taken] = bob.model.merge({ lists: [], items: [item] }).items;
  assert.equal(taken.updatedAt, START);
  bob.clock.at += 1_000;
  exchange(bob.model, carol.model);
  carol.clock.at += 2_000;
  carol.model.changeItem(item.id, { deleted: true });
  exchange(bob.model, carol.model);
  // A third one brings the poison again, and again.
  for (const device of [bob, carol]) {
    device.clock.at += 86_400_000;
    assert.deepEqual(device.model.merge({ lists: [], items: [item] }).items, []);
    assert.ok(device.model.items.get(item.id).deleted);
  }
});

test("what was poisoned before heals when it is loaded", () => {
  const [alice, bob] = [makeDevice("alice"), makeDevice("bob")];
  const list = alice.model.addList("Groceries");
  const milk = { ...alice.model.addItem(list.id, "Milk", ""), updatedAt: MAX_AT };
  const bread = { ...milk, id: "bread-of-alice", text: "Bread", updatedAt: START };
  const kept = { lists: [{ ...list, updatedAt: MAX_AT }], items: [milk, bread] };
  const healed = bob.model.load(kept);
  assert.deepEqual(
    [...healed.lists, ...healed.items].map(({ id, updatedAt }) => [id, updatedAt]),
    [[list.id, START], [milk.id, START]],
  );
  bob.model.changeItem(milk.id, { done: true });
  alice.model.load(kept);
  exchange(alice.model, bob.model);
  assert.ok(alice.model.items.get(milk.id).done);
  assert.deepEqual(alice.model.load(everything(alice.model)), { lists: [], items: [] });
});

test("a clock that is not set judges nobody", () => {
  const { model } = makeDevice("alice", 0);
  const list = { ...makeDevice("bob").model.addList("Groceries") };
  assert.equal(model.merge({ lists: [list], items: [] }).lists[0].updatedAt, START);
});

test("random changes on three devices converge, whatever the order of syncs", () => {
  for (let seed = 1; seed <= 200; seed += 1) {
    let state = seed;
    const random = (count) => {
      state = (state * 48_271) % 2_147_483_647;
      return state % count;
    };
    const devices = ["alice", "bob", "carol"].map((name) =>
      makeDevice(name, START + random(100_000)),
    );
    devices[0].model.addList("Groceries");
    for (let step = 0; step < 60; step += 1) {
      const { model, clock } = devices[random(3)];
      clock.at += random(3) - 1;
      const [list, item] = [[...model.lists.values()][0], [...model.items.values()][random(5)]];
      const change = [
        () => list && model.addItem(list.id, `thing ${step}`, ""),
        () =>
          item && model.changeItem(item.id, { done: random(2) === 1, deleted: random(3) === 0 }),
        () =>
          list && model.changeList(list.id, { name: `list ${step}`, deleted: random(4) === 0 }),
        () => exchange(model, devices[random(3)].model),
      ];
      change[random(4)]();
    }
    for (const [one, other] of [
      [0, 1],
      [1, 2],
      [0, 1],
    ])
      exchange(devices[one].model, devices[other].model);
    assert.deepEqual(sorted(devices[0].model), sorted(devices[1].model), `seed ${seed}`);
    assert.deepEqual(sorted(devices[0].model), sorted(devices[2].model), `seed ${seed}`);
  }
});

test("a contact writes only to the lists that are shared with it", () => {
  const { model } = makeDevice("alice");
  const [open, secret] = [model.addList("Groceries"), model.addList("Presents")];
  const item = model.addItem(secret.id, "Ring", "");
  const later = { updatedAt: START + 1_000, by: "device-eve" };
  const came = model.merge(
    {
      lists: [
        { ...secret, ...later, name: "Taken" },
        { ...open, ...later, name: "Market" },
      ],
      items: [
        { ...item, ...later, text: "Nothing" },
        { ...item, ...later, list: open.id },
        { ...item, ...later, list: "unknown-list" },
      ],
    },
    (list) => list === open.id,
  );
  assert.deepEqual(
    came.lists.map(({ name }) => name),
    ["Market"],
  );
  // An item never moves to another list.
  assert.deepEqual(came.items, []);
  assert.equal(model.items.get(item.id).text, "Ring");
});

test("a full list takes no more, from nobody", () => {
  const { model } = makeDevice("alice");
  const list = model.addList("Groceries");
  const template = model.addItem(list.id, "Milk", "");
  const many = Array.from({ length: MAX_ITEMS + 10 }, (_, place) => ({
    ...template,
    id: `from-eve-${place}`,
  }));
  assert.equal(model.merge({ lists: [], items: many }).items.length, MAX_ITEMS - 1);
  assert.throws(() => model.addItem(list.id, "Bread", ""), FullError);
});

/** A device with lists that are full but for some items of the bound for a contact. */
function makeFilled(missing, text = "Milk") {
  const { model } = makeDevice("alice");
  const ids = [];
  let template;
  for (let left = MAX_ITEMS_OF_CONTACT - missing; left > 0; left -= MAX_ITEMS) {
    const { id } = model.addList(`list ${left}`);
    ids.push(id);
    for (let count = Math.min(left, MAX_ITEMS); count > 0; count -= 1) {
      template = model.addItem(id, text, "");
    }
  }
  const last = model.addList("last").id;
  return { model, ids: [...ids, last], template: { ...template, list: last } };
}

test("a contact adds so many items to all its lists, and changes what is there", () => {
  for (const [missing, taken] of [[2, 1], [1, 1], [0, 0]]) {
    const { model, ids, template } = makeFilled(missing);
    const room = model.roomIn(ids);
    const item = { ...template, id: "one-more", updatedAt: START + 1_000_000 };
    const mayWrite = (list) => ids.includes(list);
    assert.equal(model.merge({ lists: [], items: [item] }, mayWrite, room).items.length, taken);
    assert.equal(room.refused, 1 - taken);
    const [known] = model.items.values();
    const changed = { ...known, done: true, updatedAt: START + 1_000_000 };
    assert.equal(model.merge({ lists: [], items: [changed] }, mayWrite, room).items.length, 1);
  }
});

test("a contact adds so many bytes to all its lists, and may make them fewer", () => {
  const { model, ids, template } = makeFilled(MAX_ITEMS_OF_CONTACT / 2);
  const { bytes } = model.roomIn(ids);
  const ofLists = ids.reduce((sum, id) => sum + 200 + model.lists.get(id).name.length, 0);
  assert.equal(bytes, MAX_BYTES_OF_CONTACT - (MAX_ITEMS_OF_CONTACT / 2) * 204 - ofLists);
  for (const [left, taken] of [[205, 1], [204, 1], [203, 0]]) {
    const room = { items: 10, bytes: left, refused: 0 };
    const item = { ...template, id: `one-more-${left}` };
    assert.equal(model.merge({ lists: [], items: [item] }, undefined, room).items.length, taken);
  }
  const [known] = model.items.values();
  for (const [text, taken] of [["Milk!", 0], ["Oil", 1]]) {
    const room = { items: 0, bytes: 0, refused: 0 };
    const item = { ...known, text, updatedAt: START + 1_000_000 };
    assert.equal(model.merge({ lists: [], items: [item] }, undefined, room).items.length, taken);
  }
});

test("a contact adds so many bytes of names of lists, and may make them fewer", () => {
  const { model } = makeDevice("alice");
  const known = model.addList("Milk");
  const list = { ...known, name: "Käse", updatedAt: START + 1_000_000 };
  for (const [left, taken] of [[206, 1], [205, 1], [204, 0]]) {
    const room = { items: 0, bytes: left, refused: 0 };
    const lists = [{ ...list, id: `one-more-${left}` }];
    assert.equal(model.merge({ lists, items: [] }, undefined, room).lists.length, taken);
    assert.deepEqual([room.bytes, room.refused], [left - taken * 205, 1 - taken]);
  }
  for (const [left, name, taken] of [[0, "Käse", 0], [1, "Käse", 1], [0, "Oil", 1]]) {
    const room = { items: 0, bytes: left, refused: 0 };
    const { model: other } = makeDevice("bob");
    other.merge({ lists: [known], items: [] });
    const lists = [{ ...list, name }];
    assert.equal(other.merge({ lists, items: [] }, undefined, room).lists.length, taken);
  }
});

test("a message has so many levels of arrays and objects, and brackets in text are none", () => {
  const nested = (levels) => (
    `{"type":"later","more":${"[".repeat(levels - 1)}"}]"${"]".repeat(levels - 1)}}`);
  for (const levels of [MAX_LEVELS - 1, MAX_LEVELS]) {
    assert.equal(readMessage(nested(levels)), null);
  }
  assert.throws(() => readMessage(nested(MAX_LEVELS + 1)), TypeError);
  assert.throws(() => readMessage("[".repeat(65_536)), TypeError);
  const text = JSON.stringify({ type: "later", text: `"\\${"[{".repeat(MAX_LEVELS)}` });
  assert.equal(readMessage(text), null);
});

test("what is forgotten makes room", () => {
  const { model, ids } = makeFilled(0);
  model.forget(ids);
  const { items, bytes } = model.roomIn(ids);
  assert.deepEqual([items, bytes], [MAX_ITEMS_OF_CONTACT, MAX_BYTES_OF_CONTACT]);
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
  for (let count = 0; count < MAX_ITEMS; count += 1) {
    model.addItem(list.id, "🥕".repeat(50 + (count % 150)), "1 kg");
  }
  const texts = writeChanges(everything(model)).map((part) =>
    JSON.stringify({ type: "changes", number: 1, ...part }),
  );
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

test("a hello of a newer app is said to be somebody's, and never the contact's", () => {
  const person = { nickname: "Bob", pending: false, syncedAt: 0, deleted: false };
  const warnings = new Set(["needs_newer_app"]);
  const moment = { lastEvent: "", warnings, isConnected: false, differs: false };
  const [tone, text] = standingOf(person, { ...moment, state: "invited" });
  assert.equal(tone, "wait");
  assert.match(text, /^Somebody with the link has a newer app/);
  // The link vouches for its maker.
  const [, ofMaker] = standingOf(person, { ...moment, state: "opened" });
  assert.match(ofMaker, /^Bob has a newer app/);
});

test("lists and items that find no room are counted, and those that change nothing are not", () => {
  for (const [missing, refused] of [[2, 0], [1, 0], [0, 1]]) {
    const { model } = makeDevice("alice");
    const list = model.addList("full");
    for (let count = MAX_ITEMS - missing; count > 0; count -= 1) model.addItem(list.id, "Milk", "");
    const [known] = model.items.values();
    const room = model.roomIn([list.id]);
    model.merge({ lists: [list], items: [known, { ...known, id: "one-more" }] }, undefined, room);
    assert.equal(room.refused, refused);
    for (let count = MAX_LISTS - missing - 1; count > 0; count -= 1) model.addList("other");
    const more = { ...list, id: "list-more" };
    const item = { ...known, id: "item-more", list: more.id };
    model.merge({ lists: [more], items: [item] }, undefined, room);
    // A list without room, and with it the item.
    assert.equal(room.refused, 3 * refused);
  }
});

test("what somebody else had the id of is counted too, and what is older is not", () => {
  const { model } = makeDevice("alice");
  const [known, theirs] = [model.addList("Bob's"), model.addList("Carol's")];
  const item = model.addItem(theirs.id, "Milk", "");
  const now = { ...known, updatedAt: known.updatedAt + 1 };
  const ahead = { ...known, updatedAt: START + 10 * 86_400_000 };
  for (const [lists, items, refused] of [
    [[now], [], 0],
    [[known], [], 0],
    // Of a time that no clock can have had, what is known stays.
    [[ahead], [], 1],
    // A list, and an item in a list, that are not shared with the sender.
    [[{ ...theirs, updatedAt: START + 1_000 }], [], 1],
    [[], [{ ...item, id: "item-more" }], 1],
    // An item of another list.
    [[], [{ ...item, list: known.id }], 1],
  ]) {
    const room = model.roomIn([known.id]);
    model.merge({ lists, items }, (list) => list === known.id, room);
    assert.equal(room.refused, refused);
  }
});

test("no warning hides another, nor what is known of connecting", async () => {
  // Node 20 has no navigator.
  Object.defineProperty(globalThis, "navigator", { value: { onLine: true }, configurable: true });
  const { sync, is } = makeListener();
  await sync._heard("bob", "flooded");
  await sync._heard("bob", "needs_newer_app");
  await sync._heard("bob", "opened_twice");
  await sync._heard("bob", "refused");
  const [tone, text] = is({ state: "invited" });
  assert.equal(tone, "bad");
  assert.match(text, /fills the mailbox.*has a newer app/);
  await sync._heard("bob", "paired");
  await sync._heard("bob", "unreachable");
  for (const event of ["opened_twice", "flooded", "needs_newer_app", "contact_renewed"]) {
    await sync._heard("bob", event);
    assert.match(is({ state: "paired" })[1], /^Your two networks/);
  }
});

test("relays of others say nothing of one's own, and are not remembered", async (t) => {
  const { sync } = makeListener();
  const [own, others] = ["https://own.example/", "https://others.example/"];
  let isDown = false;
  t.mock.method(globalThis, "fetch", async (url) => {
    if (isDown && url === own) throw new TypeError("Failed to fetch");
    return new Response("{}");
  });
  const lib = { contacts: () => [{ relays: [[own, null]] }] };
  const ask = async (url) => {
    const error = new RelayError(`${url} cannot be reached: it is off.`);
    await sync._fetch(lib, url).catch(() => sync._troubled(lib, error));
  };
  await ask(own);
  assert.equal(sync.relayTrouble, "");
  isDown = true;
  for (const url of [own, others, `${others}1`, `${others}2`]) await ask(url);
  assert.equal(sync.relayTrouble, `${own} cannot be reached.`);
  assert.equal(sync._answers.size, 1);
  // Nor does what is said of them.
  sync._troubled(lib, new RelayError(`${others} cannot be reached: it is off.`));
  assert.equal(sync.relayTrouble, `${own} cannot be reached.`);
  isDown = false;
  await ask(own);
  assert.equal(sync.relayTrouble, "");
});

test("a contact who never confirms is reached ever more seldom", async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const { sync } = makeListener();
  let reached = 0;
  sync._lib = {
    contacts: () => [{ name: "bob", state: "paired" }],
    connect: async () => { reached += 1; },
  };
  const session = { channel: {}, number: 1, acknowledged: 0, refused: 0, lacking: 0, timer: 0 };
  const end = () => {
    sync._sessions.set("bob", session);
    sync._ended("bob", session);
  };
  for (const pauseMs of [0, 60_000, 300_000, 1_800_000, 1_800_000]) {
    const before = reached;
    end();
    sync._reach("bob");
    t.mock.timers.tick(Math.max(0, pauseMs - 1));
    if (pauseMs) assert.equal(reached, before);
    t.mock.timers.tick(1);
    assert.equal(reached, before + 1);
  }
  await sync._acknowledged("bob", session, { number: 1, refused: 0 });
  await sync._update("bob", { pending: true });
  end();
  t.mock.timers.tick(1);
  assert.equal(reached, 6);
});

/** A page with one person, and how it stands with that one, at a moment of one's choice. */
function makeListener() {
  const { model } = makeDevice("alice");
  const sync = new Sync({
    model, write: async () => {}, load: async () => [], appUrl: "", onChange() {}, onNews() {},
  });
  const person = {
    id: "bob", nickname: "Bob", lists: [], theirs: [], pending: true, syncedAt: 7, deleted: false,
  };
  sync._people.set("bob", person);
  const is = (moment) => standingOf(person, {
    why: "", attempt: "apart", isConnected: false, differs: false, isRelayDown: false,
    isPaused: false, lastEvent: sync._lastEvent.get("bob") ?? "",
    warnings: sync._warnings.get("bob") ?? new Set(), ...moment,
  });
  return { sync, is };
}

test("networks that do not connect are told with the time of the next attempt", async () => {
  const { sync, is } = makeListener();
  await sync._heard("bob", "unreachable");
  const againAt = new Date(2027, 0, 15, 14, 5).getTime();
  const says = (moment) => is({ state: "paired", ...moment })[1];
  assert.match(says({ againAt }), /Trying again at 14:05, and at once in another network\.$/);
  assert.match(says({ attempt: "joining", againAt: null }), /Trying again now\.$/);
  assert.match(says({ againAt: null }), /Try again in another network\.$/);
  await sync._heard("bob", "unsent");
  assert.match(says({ againAt }), /No relay takes/);
});

/** A page with one person, what it sends on a channel, and what it says to its user. */
function makePage() {
  const { model } = makeDevice("alice");
  const [news, deletions] = [[], []];
  const clock = { nowMs: 0 };
  const sync = new Sync({
    model,
    write: async () => {},
    load: async () => [],
    appUrl: "",
    onChange() {},
    onNews: (words) => news.push(words),
    onDeleted: (id, words) => deletions.push(words),
    nowMs: () => clock.nowMs,
  });
  const sent = [];
  const channel = { send: async (text) => sent.push(JSON.parse(text)), close() {} };
  const session = { channel, number: 1, acknowledged: 0, refused: 0, lacking: 0, timer: 0 };
  const person = {
    id: "bob", nickname: "Bob", lists: [], theirs: [], pending: true, syncedAt: 7, deleted: false,
  };
  sync._people.set("bob", person);
  const hear = async (message) => {
    await sync._came("bob", session, JSON.stringify(message));
    clearTimeout(session.timer);
    return sync._people.get("bob");
  };
  return { model, sync, session, sent, hear, news, deletions, clock };
}

test("what finds no room is said to the sender, who does not call it synced", async () => {
  const page = makePage();
  const from = { updatedAt: START, by: "device-bob", deleted: false };
  const list = { ...from, id: "list-bob-0001", name: "Bob's" };
  const items = Array.from({ length: MAX_ITEMS + 3 }, (_, number) => ({
    ...from, id: `item-bob-${number}`, list: list.id, text: "Milk", quantity: "", done: false,
  }));
  for (const [place, part] of writeChanges({ lists: [list], items }).entries()) {
    await page.hear({ type: "changes", number: place + 1, ...part });
  }
  const refused = page.sent.map((ack) => ack.refused);
  assert.deepEqual(refused, [...refused.slice(1).fill(0), 3]);

  const { pending, syncedAt, lacking } = await page.hear({ type: "ack", number: 1, refused: 3 });
  assert.deepEqual([pending, syncedAt, lacking], [false, 7, 3]);
  const moment = {
    state: "paired", isConnected: true, differs: false, lastEvent: "", warnings: new Set(),
  };
  const [tone, text] = standingOf({ nickname: "Bob", pending, lacking }, moment);
  assert.deepEqual([tone, text], ["bad", "Bob's app has not taken 3 things of yours."]);
});

test("what was forgotten here meanwhile is not changed, and comes back by no change", () => {
  const { model } = makeDevice("alice");
  const list = model.addList("Groceries");
  const item = model.addItem(list.id, "Milk", "");
  model.forget([list.id]);
  assert.throws(() => model.changeList(list.id, { name: "Market" }), GoneError);
  assert.throws(() => model.changeItem(item.id, { text: "Bread" }), GoneError);
  assert.throws(() => model.addItem(list.id, "Bread", ""), GoneError);
  assert.deepEqual(sorted(model), []);
});

/** What Bob may say of a list of his. */
const listOfBob = (id) => ({
  id, name: "Bob's", updatedAt: START, by: "device-bob", deleted: false,
});

test("a list that a contact has deleted is not theirs when somebody else brings it", async () => {
  const { hear } = makePage();
  const shared = await hear({
    type: "changes", number: 1, lists: [listOfBob("list-carol-1")], items: [],
  });
  assert.deepEqual([shared.lists, shared.theirs], [["list-carol-1"], ["list-carol-1"]]);
  const { lists, theirs } = await hear({ type: "bye", number: 2, delete: true });
  assert.deepEqual([lists, theirs], [[], []]);
});

test("a list that finds no room is not shared with who brought it", async () => {
  for (const [missing, isTaken] of [[2, true], [1, true], [0, false]]) {
    const { model, hear } = makePage();
    for (let count = MAX_LISTS - missing; count > 0; count -= 1) model.addList("Groceries");
    const brought = { type: "changes", number: 1, lists: [listOfBob("list-carol-1")], items: [] };
    const { lists, theirs } = await hear(brought);
    const taken = isTaken ? ["list-carol-1"] : [];
    assert.deepEqual([lists, theirs], [taken, taken]);
  }
});

test("what is kept of a contact does not grow by lists that come and go", async () => {
  const { model, hear } = makePage();
  for (let round = 1; round <= 5; round += 1) {
    const lists = Array.from({ length: MAX_LISTS_OF_CONTACT + 1 }, (_, place) =>
      listOfBob(`list-bob-${round}-${place}`));
    const person = await hear({ type: "changes", number: 2 * round, lists, items: [] });
    assert.equal(person.lists.length, MAX_LISTS_OF_CONTACT);
    assert.deepEqual(person.lists, [...model.lists.keys()]);
    const after = await hear({ type: "bye", number: 2 * round + 1, delete: true });
    assert.deepEqual([after.lists, after.theirs], [[], []]);
  }
});

test("an acknowledgement counts once, and for what was sent", async () => {
  const { hear, session } = makePage();
  session.number = 3;
  for (const [number, acknowledged, lacking] of [
    [2, 2, 500], [2, 2, 500], [1, 2, 500], [4, 3, 1_000], [3, 3, 1_000], [9, 3, 1_000],
  ]) {
    await hear({ type: "ack", number, refused: 500 });
    assert.deepEqual([session.acknowledged, session.lacking], [acknowledged, lacking]);
  }
});

test("what still comes from somebody who is gone makes nobody", async () => {
  const { hear, sync, sent } = makePage();
  await sync._removePerson("bob");
  for (const message of [
    { type: "ack", number: 1, refused: 0 },
    { type: "bye", number: 2, delete: true },
    { type: "changes", number: 3, lists: [listOfBob("list-bob-0001")], items: [] },
  ]) {
    assert.equal(await hear(message), undefined);
  }
  assert.equal(sync._people.size, 0);
  assert.equal(sent.length, 2);
});

test("what others say is drawn once in a while, and what the user does at once", (t) => {
  t.mock.timers.enable({ apis: ["setTimeout", "Date"] });
  let drawn = 0;
  const { soon, now } = paced(() => { drawn += 1; }, 200);
  const after = (ms, count) => {
    t.mock.timers.tick(ms);
    assert.equal(drawn, count);
  };
  [1, 2, 3].forEach(soon);
  after(0, 1);
  [1, 2, 3].forEach(soon);
  after(199, 1);
  after(1, 2);
  soon();
  now();
  after(0, 3);
  after(199, 3);
  // That was for both.
  after(1_000, 3);
  soon();
  after(0, 4);
});

test("that something is not taken is told once in an hour", async () => {
  const { hear, news, clock } = makePage();
  const item = {
    id: "item-bob-0001", list: "list-unknown", text: "Milk", quantity: "", done: false,
    updatedAt: START, by: "device-bob", deleted: false,
  };
  const hour = 3_600_000;
  for (const [number, [nowMs, told]] of [
    [0, 1], [0, 1], [hour - 1, 1], [hour, 2], [hour + 1, 2],
  ].entries()) {
    clock.nowMs = nowMs;
    await hear({ type: "changes", number: number + 1, lists: [], items: [item] });
    assert.equal(news.length, told);
  }
});

test("what a contact has deleted here is told, by name", async () => {
  const { model, hear, deletions } = makePage();
  let number = 0;
  const share = (...names) => hear({
    type: "changes",
    number: (number += 1),
    lists: names.map((name) => ({ ...listOfBob(`list-${name}`), name })),
    items: [],
  });
  const bye = () => hear({ type: "bye", number: (number += 1), delete: true });
  // Nothing was shared.
  assert.equal((await bye()).deleted, false);
  assert.deepEqual(deletions, []);
  const own = model.addList("Groceries");
  await share("Party", "Garden");
  assert.equal((await bye()).deleted, true);
  assert.deepEqual([...model.lists.keys()], [own.id]);
  const asked = "Bob's app has asked to delete what Bob had shared with you. Deleted here: ";
  assert.equal(deletions.at(-1), `${asked}Party, Garden.`);
  // It says "the lists were deleted here" of what is here no longer.
  assert.equal((await share("Attic-01")).deleted, false);
  await bye();
  assert.equal(deletions.at(-1), `${asked}Party, Garden, Attic-01.`);
  await share("Cellar-1");
  await bye();
  assert.equal(deletions.at(-1), `${asked}Party, Garden, Attic-01 and 1 more list.`);
});

/** A keeper whose database is one of a test's choice. */
function makeKeeper(t, put = () => {}) {
  const problems = [];
  const heard = [];
  const keeper = new Keeper((words) => problems.push(words), (...news) => heard.push(news));
  const transaction = () => {
    const one = { objectStore: () => ({ put, delete() {} }), abort() {} };
    setImmediate(() => one.oncomplete?.());
    return one;
  };
  keeper._db = { transaction, close() {} };
  t.after(() => keeper.close());
  return { keeper, problems, heard };
}

test("other tabs hear which lists are gone", async (t) => {
  const [here, there] = [makeKeeper(t), makeKeeper(t)];
  const heard = new Promise((resolve) => {
    there.keeper._tabs.addEventListener("message", resolve);
  });
  await here.keeper.write({}, { lists: ["list-bob-0001"], items: ["item-bob-0001"] });
  await heard;
  assert.deepEqual(there.heard, [[{ lists: [], items: [] }, ["list-bob-0001"]]]);
});

test("the browser is blamed for what its storage does, and for nothing else", async (t) => {
  for (const [name, words] of [
    ["QuotaExceededError", /^The storage of this browser is full/],
    ["UnknownError", /^This browser keeps nothing/],
    ["DataError", /^What you changed last could not be kept/],
    ["DataCloneError", /^What you changed last could not be kept/],
  ]) {
    const { keeper, problems } = makeKeeper(t, () => { throw new DOMException("", name); });
    await keeper.write({ items: [{}] });
    assert.match(problems.join(), words);
  }
});
