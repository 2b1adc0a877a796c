/** The store without a browser: what it says once it is closed. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { Store } from "../store.js";

test("a store that is closed says so, whatever is asked of it", async () => {
  const done = [];
  const db = { close: () => done.push("closed"), transaction: () => assert.fail() };
  const store = new Store(db, () => done.push("released"));
  // Another page wants it.
  db.onversionchange();
  assert.deepEqual(done, ["closed", "released"]);
  const asks = [
    () => store.load(), () => store.add({}), () => store.save(1, {}), () => store.delete(1),
    () => store.loadRefusals(), () => store.saveRefusals(1, {}),
  ];
  for (const ask of asks) {
    await assert.rejects(ask, { name: "StoreError", message: /contacts of this page are closed/ });
  }
});
