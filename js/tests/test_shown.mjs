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
  ["a\u200b\u200b\u200d\ufeffb\u2060", "a b"],
  ["a\tb", "a b"],
  ["a\nb\r\x1b[2J\x9b2J", "a\ufffdb\ufffd\ufffd[2J\ufffd2J"],
  ["a\u2028b\u2029c", "a\ufffdb\ufffdc"],
  ["\u202egpj.exe\u2066", "\ufffdgpj.exe\ufffd"],
  ["\u200d", ""],
  ["\ud800x", "\ufffdx"],
  ["🥕👍🏽", "🥕👍🏽"],
  // Text of any script stays as it is.
  ["10\u202fAM, 20\u00a0km, \ue000", "10\u202fAM, 20\u00a0km, \ue000"],
  ["\u0645\u06cc\u200c\u0634\u0648\u062f", "\u0645\u06cc\u200c\u0634\u0648\u062f"],
  ["\u0915\u094d\u200d\u0937", "\u0915\u094d\u200d\u0937"],
  ["👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"],
  ["\u05d0\u200f1", "\u05d0\u200f1"],
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

test("no character falls apart where the middle is left out", () => {
  for (const grapheme of ["e\u0301", "👍🏽", "👨\u200d👩\u200d👧", "🇩🇪", "\u0915\u093f"]) {
    for (let shift = 0; shift < 6; shift += 1) {
      const line = shown("e".repeat(shift) + grapheme.repeat(MAX_SHOWN_CHARS));
      assert.ok([...line].length <= MAX_SHOWN_CHARS);
      const [head, tail] = line.split("\u2026");
      for (const part of [head.slice(shift), tail]) {
        assert.equal(part, grapheme.repeat(part.length / grapheme.length));
      }
    }
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
