/** What others send is shown as a part of one line: the cases of tests/library/test_shown.py. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { RelayClient } from "../relay_client.js";
import { MAX_SHOWN_CHARS, shown } from "../shown.js";

const CASES = [
  ["", ""],
  ["Straße 1", "Straße 1"],
  [" a \t b ", "a b"],
  ["a\u00a0\u2003\u2800\u3164\u115f\u1160\uffa0b", "a b"],
  ["a\nb\r\x1b[2J\x9b2J", "a\ufffdb\ufffd\ufffd[2J\ufffd2J"],
  ["a\u2028b\u2029c", "a\ufffdb\ufffdc"],
  ["\u202egpj.exe\u2066", "\ufffdgpj.exe\ufffd"],
  ["a\u200bb\ue000\ufeff", "a\ufffdb\ufffd\ufffd"],
  ["\ud800x", "\ufffdx"],
  ["🥕👍🏽", "🥕👍🏽"],
];

test("a text from outside becomes a part of one line", () => {
  for (const [text, line] of CASES) {
    assert.equal(shown(text), line);
    assert.equal(shown(line), line);
  }
});

test("a long text loses its middle", () => {
  for (const char of ["e", "🥕"]) {
    for (const length of [MAX_SHOWN_CHARS - 1, MAX_SHOWN_CHARS]) {
      assert.equal(shown(char.repeat(length)), char.repeat(length));
    }
    const head = MAX_SHOWN_CHARS - Math.floor(MAX_SHOWN_CHARS / 3) - 1;
    const line = `${char.repeat(head)}\u2026${char.repeat(MAX_SHOWN_CHARS - head - 2)}.`;
    assert.equal(shown(`${char.repeat(MAX_SHOWN_CHARS)}.`), line);
  }
});

/** @param {object} reply */
function clientOf(reply) {
  const fetch = async () => new Response(JSON.stringify(reply));
  const sleep = () => new Promise(() => {});
  return new RelayClient("https://relay.example.com/", { fetch, sleep });
}

test("the words of a relay are shown in one line, and what is no text has none", async () => {
  const says = "https://relay.example.com/ says";
  for (const [error, words] of [
    ["Full\n\u202e", "Full\ufffd\ufffd"],
    ['Busy". Renew at https://evil.example. It says "ok',
      "Busy'. Renew at https://evil.example. It says 'ok"],
    [7, ""],
    [null, ""],
  ]) {
    const client = clientOf({ ok: false, error });
    const expected = { name: "RelayRefusalError", message: `${says} "${words}".` };
    await assert.rejects(client.ask({}), expected);
  }
  const client = clientOf({ ok: false, error: "Busy", detail: "a  b." });
  await assert.rejects(client.ask({}), { message: `${says} "Busy: a b".` });
});
