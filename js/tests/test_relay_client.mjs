/** The client of a relay, against a relay that answers rubbish. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { CONTEXTS, RelayClient, RelayError, encodeBase64url } from "../connectoid.js";
import {
  Budget, MAX_BESIDE_BYTES, MAX_CHECK_REPLY_BYTES, MAX_DATA_CHARS, MAX_MESSAGES,
  MAX_QUESTION_CHARS, MAX_RECEIVE_CHARS, MAX_REPLY_MARKS, MAX_SEND_REPLY_BYTES, RECEIVE_LIMIT,
  checkMailboxes, readMailbox,
} from "../relay_client.js";
import { SUITE, serve } from "./harness.mjs";

const MIB = 1_048_576;
const LARGE = JSON.stringify({ ok: true, x: "a".repeat(MIB) });
const ELSEWHERE = { Location: "http://127.0.0.1:1/" };

const RUBBISH = {
  "no JSON": (response) => response.end("<html>"),
  "a number": (response) => response.end("1"),
  nothing: (response) => response.end(),
  "not UTF-8": (response) => response.end(Buffer.from([0x22, 0xff, 0x22])),
  "over 1 MiB": (response) => response.end(LARGE),
  "a redirect": (response) => response.writeHead(307, ELSEWHERE).end(),
  "an error": (response) => (
    response.writeHead(400).end('{"ok":false,"error":"Bad request"}')),
  "ok that is no boolean": (response) => response.end('{"ok":1}'),
  "an error that is no text": (response) => response.end('{"ok":false,"error":{"toString":1}}'),
  "a cut connection": (response) => response.socket.destroy(),
};
for (const [name, answer] of Object.entries(RUBBISH)) {
  test(`relay that answers ${name} is a relay that failed`, async () => {
    const { url } = await serve(answer);
    await assert.rejects(new RelayClient(url).ask({ action: "check" }), RelayError);
  });
}

for (const [size, isTaken] of [
  [MAX_SEND_REPLY_BYTES - 1, true], [MAX_SEND_REPLY_BYTES, true], [MAX_SEND_REPLY_BYTES + 1, false],
]) {
  test(`a reply of ${size} bytes to a send ${isTaken ? "counts" : "is too large"}`, async () => {
    const empty = JSON.stringify({ ok: true, more: "" });
    const reply = JSON.stringify({ ok: true, more: "x".repeat(size - empty.length) });
    const { url } = await serve((response) => response.end(reply));
    const sending = new RelayClient(url).send({ pub: "A".repeat(66), url, ext: null }, "AAAA");
    if (isTaken) await sending;
    else await assert.rejects(sending, /a reply over 4 KiB/);
  });
}

// Its own marks are two brackets and a comma.
for (const more of [-1, 0, 1]) {
  test(`a reply of ${more} values more than it may have`, async () => {
    const reply = { ok: true, more: new Array(MAX_REPLY_MARKS - 2 + more).fill(0) };
    const { url } = await serve((response) => response.end(JSON.stringify(reply)));
    const asking = new RelayClient(url).ask({});
    if (more <= 0) assert.deepEqual(await asking, reply);
    else await assert.rejects(asking, /it answered more than was asked/);
  });
}

for (const [status, reply] of [[200, []], [500, []], [500, { ok: true }], [201, { ok: true }]]) {
  const shown = JSON.stringify(reply);
  test(`a send that is answered by ${status} and ${shown} was not taken`, async () => {
    const { url } = await serve((response) => response.writeHead(status).end(shown));
    const sending = new RelayClient(url).send({ pub: "A".repeat(66), url, ext: null }, "AAAA");
    await assert.rejects(sending, /is not a relay: it answered something else/);
  });
}

for (const [status, reply, told] of [
  [503, { ok: false, error: "Busy", retry: 5 }, /says "Busy"/],
  [200, { ok: false }, /says ""/],
  [502, { stun: true }, /no document/],
  [200, [], /no document/],
]) {
  const shown = JSON.stringify(reply);
  test(`${status} and ${shown} is no document of a relay`, async () => {
    const { url } = await serve((response) => response.writeHead(status).end(shown));
    await assert.rejects(new RelayClient(url).document(), told);
  });
}

for (const [retry, isTold] of [
  [59, false], [60, false], [61, true], [86_399, true], [86_400, true], [86_401, false],
  [true, false], ["61", false],
]) {
  test(`a pause of ${retry} s that a relay asks for is told: ${isTold}`, async () => {
    const reply = JSON.stringify({ ok: false, error: "Too often", retry });
    const { url } = await serve((response) => response.writeHead(429).end(reply));
    const error = await new RelayClient(url).ask({ action: "send" }).catch((thrown) => thrown);
    assert.equal(/ It asks you to wait until \d\d:\d\d\.$/.test(error.message), isTold);
  });
}

test("a web page in place of a reply is told as what a portal does", async () => {
  for (const page of ["<!DOCTYPE html>Welcome to the hotel", "\r\n <html>Log in"]) {
    const { url } = await serve((response) => response.end(page));
    const told = /^\w*Error: .* a web page, as networks do where users have to log in: open/;
    await assert.rejects(new RelayClient(url).ask({ action: "check" }), told);
  }
});

const WRONG_MESSAGES = {
  "a list": [],
  "messages that are none": { ok: true, messages: "abc" },
  numbers: { ok: true, messages: [1] },
  "no data": { ok: true, messages: [{ at: 1 }] },
  "at of no integer": { ok: true, messages: [{ at: true, data: "AA" }] },
  "at too large": { ok: true, messages: [{ at: 2 ** 53, data: "AA" }] },
  "at below 0": { ok: true, messages: [{ at: -1, data: "AA" }] },
  "at that was read": { ok: true, messages: [{ at: 0, data: "AA" }] },
  "at twice": { ok: true, messages: Array(2).fill({ at: 1, data: "AA" }) },
  "34,000 messages": repliesOf(Array(34_000).fill("QU")),
};

/** Return a reply with these messages. */
function repliesOf(texts) {
  return { ok: true, messages: texts.map((data, place) => ({ at: place + 1, data })) };
}

/** Read a mailbox at a relay that answers so, within a budget. */
async function readFrom(answer, budget = new Budget()) {
  const [key, pub] = await SUITE.makeKey("ECDH");
  const secret = new TextEncoder().encode("answer");
  const question = encodeBase64url(await SUITE.seal(pub, CONTEXTS.question, secret));
  const { url } = await serve((response, body) => {
    const reply = body.startsWith("[")
      ? [{ ok: true, found: true, question }] : answer(JSON.parse(body));
    response.end(JSON.stringify(reply));
  });
  const client = new RelayClient(url);
  const polls = [{ mailbox: { pub, url, ext: null }, key, at: 0 }];
  const [checked] = await checkMailboxes(client, polls, 0);
  return readMailbox(SUITE, client, checked, budget);
}

for (const [name, received] of Object.entries(WRONG_MESSAGES)) {
  test(`relay that answers a receive with ${name} is a relay that failed`, async () => {
    await assert.rejects(readFrom(() => received), RelayError);
  });
}

const LONGEST = "A".repeat(MAX_DATA_CHARS);
// As many as a reply may hold.
const ALL = Array(MAX_RECEIVE_CHARS / MAX_DATA_CHARS).fill(LONGEST);
const BOUNDS = [
  ["messages", Array(RECEIVE_LIMIT - 1).fill("QU"), true],
  ["messages", Array(RECEIVE_LIMIT).fill("QU"), true],
  ["messages", Array(RECEIVE_LIMIT + 1).fill("QU"), false],
  ["a long message", [LONGEST.slice(1)], true],
  ["a long message", [LONGEST], true],
  ["a long message", [`${LONGEST}A`], false],
  ["much data", [...ALL.slice(1), LONGEST.slice(1)], true],
  ["much data", ALL, true],
  ["much data", [...ALL, "A"], false],
];
for (const [name, texts, isTaken] of BOUNDS) {
  const chars = texts.join("").length;
  test(`a reply with ${name} (${texts.length}, ${chars}) is taken or broken`, async () => {
    const end = { ok: true, found: false };
    const reading = readFrom(({ at }) => (at ? end : repliesOf(texts)));
    if (isTaken) assert.deepEqual((await reading).map(([, data]) => data), texts);
    else await assert.rejects(reading, /^\w*Error: .* is not a relay/);
  });
}

for (const over of [-1, 0, 1]) {
  for (const count of [1, 2]) {
    const words = over > 0 ? "too long" : "as long as it may be";
    test(`a reply to ${count} checks with ${over} octets more is ${words}`, async () => {
      const replies = Array.from({ length: count }, () => ({ ok: true, found: false, more: "" }));
      const size = MAX_CHECK_REPLY_BYTES * count + over;
      replies[0].more = "x".repeat(size - JSON.stringify(replies).length);
      const { url } = await serve((response) => response.end(JSON.stringify(replies)));
      const poll = { mailbox: { pub: "A".repeat(66), url, ext: null }, key: "", at: 0 };
      const checking = checkMailboxes(new RelayClient(url), Array(count).fill(poll), 0);
      if (over > 0) await assert.rejects(checking, /a reply over [48] KiB/);
      else assert.deepEqual((await checking).map(({ reply }) => reply), replies);
    });
  }

  for (const texts of [[], ["QUJD"]]) {
    test(`a reply with ${texts.length} messages and ${over} octets beside them`, async () => {
      const reply = { ...repliesOf(texts), more: "" };
      const size = MAX_BESIDE_BYTES + texts.join("").length + over;
      reply.more = "x".repeat(size - JSON.stringify(reply).length);
      const reading = readFrom(({ at }) => (at ? { ok: true, found: false } : reply));
      if (over > 0) await assert.rejects(reading, /more data than it may/);
      else assert.deepEqual((await reading).map(([, data]) => data), texts);
    });
  }
}

test("a budget is looked at within a mailbox", async () => {
  const budget = new Budget();
  budget.spend(MAX_MESSAGES - RECEIVE_LIMIT - 1, 0);
  const messages = await readFrom(({ at }) => ({
    ok: true,
    messages: Array.from({ length: RECEIVE_LIMIT }, (_, n) => ({ at: at + n + 1, data: "AA" })),
  }), budget);
  assert.equal(messages.length, 2 * RECEIVE_LIMIT);
});

const ANSWERS = [
  ["A".repeat(654), true], ["A".repeat(655), true], ["A".repeat(656), false], ["\xff", false],
];
for (const [answer, isOpened] of ANSWERS) {
  test(`an answer of ${answer.length} characters is opened or that of a broken relay`, async () => {
    const [key, pub] = await SUITE.makeKey("ECDH");
    const octets = Uint8Array.from(answer, (letter) => letter.charCodeAt(0));
    const question = encodeBase64url(await SUITE.seal(pub, CONTEXTS.question, octets));
    assert.equal(question.length <= MAX_QUESTION_CHARS, answer.length <= 655);
    // Nobody listens there.
    const url = "http://127.0.0.1:9/";
    const poll = { mailbox: { pub, url, ext: null }, key, at: 0 };
    const checked = { poll, reply: { ok: true, found: true, question } };
    const reading = readMailbox(SUITE, new RelayClient(url), checked, new Budget());
    await assert.rejects(reading, isOpened ? /cannot be reached/ : /is not a relay/);
  });
}

for (const question of [undefined, 7, { toString: 1 }, "=", "QUJD"]) {
  const shown = JSON.stringify(question);
  test(`a question ${shown} that cannot be opened is that of a broken relay`, async () => {
    const [key, pub] = await SUITE.makeKey("ECDH");
    const url = "http://127.0.0.1:9/";
    const poll = { mailbox: { pub, url, ext: null }, key, at: 0 };
    const checked = { poll, reply: { ok: true, found: true, question } };
    const reading = readMailbox(SUITE, new RelayClient(url), checked, new Budget());
    await assert.rejects(reading, /is not a relay/);
  });
}

test("relay that does not answer is given up after ten seconds", async () => {
  const { url } = await serve(() => {});
  const slept = [];
  const sleep = async (seconds) => {
    slept.push(seconds);
  };
  const client = new RelayClient(url, { fetch, sleep });
  await assert.rejects(client.ask({ action: "check" }), RelayError);
  await assert.rejects(client.ask({ action: "check" }, 60), RelayError);
  assert.deepEqual(slept, [10, 70]);
});

const RETRIES = [
  [7, 7], [10_000, 900], [-5, 0], ['"x"', 0], ['"7"', 0], ["[7]", 0], ["true", 0], ["null", 0],
];
for (const [said, obeyed] of RETRIES) {
  test(`retry ${said} of a relay is taken for ${obeyed} seconds`, async () => {
    const reply = `{"ok":false,"error":"Too often","retry":${said}}`;
    const { url } = await serve((response) => response.writeHead(429).end(reply));
    const expected = (error) => error instanceof RelayError && error.retryS === obeyed;
    await assert.rejects(new RelayClient(url).ask({}), expected);
  });
}

test("requests are simple ones, so that browsers ask no permission", async () => {
  const { url, requests } = await serve((response) => response.end('{"ok":true}'));
  await new RelayClient(url).ask({ action: "check" });
  assert.equal(requests[0].headers["content-type"], "text/plain");
  assert.equal(requests[0].body, '{"action":"check"}');
});

test("a full mailbox is told with what helps", async () => {
  const { url } = await serve((response) => (
    response.writeHead(507).end('{"ok":false,"error":"Full","retry":60}')));
  await assert.rejects(new RelayClient(url).ask({ action: "send" }), /"Full".*ask for a new link/);
});
