/** What the tests need of this machine: where it is missing, they say so and end. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { test } from "node:test";

import { here } from "./harness.mjs";

/** Run the tests that need Python with another one; return their exit status and output. */
async function runWith(python) {
  // Node runs no tests for a test that is one of several.
  const { NODE_TEST_CONTEXT, ...env } = process.env;
  const child = spawn(process.execPath, ["--test", here("js/tests/test_python.mjs")], {
    env: { ...env, PYTHON: python },
  });
  let text = "";
  child.stdout.on("data", (part) => {
    text += part;
  });
  const [status] = await once(child, "close");
  return { status, text };
}

test("without Python the tests end and say how to have it", async () => {
  const { status, text } = await runWith("/nowhere/python");
  assert.equal(status, 1);
  assert.match(text, /\/nowhere\/python cannot be started \(ENOENT\): `make .venv\/ready` makes/);
});

test("with a program that runs no relay the tests end and say what it said", async () => {
  const { status, text } = await runWith(process.execPath);
  assert.equal(status, 1);
  assert.match(text, /no relay with .*connectoid_relay\.py/);
});
