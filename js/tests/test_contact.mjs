/** The machine: two contacts on a fake wire, and the tables. */

import assert from "node:assert/strict";
import { test } from "node:test";

import {
  CONNECTING, Contact, PAIRING, RecordError, UsageError, checkRecord, formatAddress,
  parseAddress, parseInvitation, prove, readLink, sealMessage, signJws,
} from "../connectoid.js";
import { MAX_STEP_MESSAGES } from "../contact/contact.js";
import { REPEATABLE } from "../contact/effects.js";
import { addressesOf } from "../contact/record.js";
import { takeIntoUse } from "../contact/rotation.js";
import {
  AGAIN_AFTER_ANSWER_S, AGAIN_IDLE_S, MAX_ADDRESS_CHARS, MAX_APP_CHARS, MAX_CANDIDATES,
  MAX_REPLACED, MAX_URL_CHARS, POLL_FAST_S, POLL_SLOW_S, ROTATION_US, TELL_EVERY_S,
} from "../limits.js";
import { RELAYS, SUITE, Wire, here, makeSdp, pair, startPython } from "./harness.mjs";

function states({ alice, bob }) {
  return [alice.attempt.state, bob.attempt.state];
}

test("two contacts pair, connect, reconnect and part", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  assert.deepEqual([alice.record.state, bob.record.state], ["paired", "paired"]);
  assert.deepEqual(states({ alice, bob }), ["connected", "connected"]);
  assert.deepEqual(alice.record.comparison, bob.record.comparison);
  assert.equal(alice.record.comparison.length, 7);
  for (const [name, contact] of Object.entries(wire.contacts)) {
    assert.equal(wire.saved[name], contact.record, "what is known is saved");
    await wire.do(name, contact.channelClosed(wire.now, contact.attempt.attemptId));
    assert.equal(contact.attempt.state, "apart");
  }
  await wire.do("Alice", alice.connect(wire.now));
  await wire.rounds(4);
  assert.deepEqual(states({ alice, bob }), ["connected", "connected"]);
  await wire.do("Bob", bob.unshare(wire.now));
  await wire.round();
  assert.deepEqual([alice.record.state, alice.record.why], ["ended", "unshared"]);
  // He has heard her answer, and keeps nothing.
  assert.equal(bob.record.state, "ended");
  assert.ok(wire.told.some(([name, event]) => name === "Alice" && event === "unshared"));
});

for (const name of ["Alice", "Bob"]) {
  test(`what ${name} has ended is said until the other has heard it`, async () => {
    const wire = new Wire();
    await pair(wire);
    await wire.rounds(4);
    const otherName = name === "Alice" ? "Bob" : "Alice";
    const { [name]: one, [otherName]: other } = wire.contacts;
    await wire.do(name, one.unshare(wire.now));
    const saysIt = async (contact) => {
      const effects = await contact.tick(wire.now);
      return effects.filter((effect) => effect.do === "send").length;
    };
    const said = [];
    for (const gapS of [AGAIN_IDLE_S - 1, 1, 1, AGAIN_IDLE_S - 1, 1]) {
      wire.nowS += gapS;
      said.push(await saysIt(one));
    }
    assert.deepEqual(said, [0, 1, 0, 1, 0]);
    // The relay has lost all that was said. A start says it anew, and its first tick alone.
    wire.boxes.clear();
    const again = new Contact(SUITE, one.record);
    wire.contacts[name] = again;
    await wire.do(name, again.tick(wire.now));
    assert.equal(await saysIt(again), 0);
    await wire.poll(otherName);
    assert.deepEqual([other.record.state, other.record.why], ["ended", "unshared"]);
    // Its answer is not answered in turn.
    const before = wire.at;
    await wire.poll(name);
    assert.deepEqual([again.record.state, wire.at], ["ended", before]);
  });
}

test("who has ended a link that nobody answers repeats nothing", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  for (const [name, contact] of Object.entries({ Alice: alice, Bob: bob })) {
    await wire.do(name, contact.unshare(wire.now));
    wire.nowS += AGAIN_IDLE_S;
    assert.deepEqual(await contact.tick(wire.now), []);
  }
});

test("an inviter whom the channel alone has proven says unshare", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.poll("Alice");
  await wire.poll("Bob");
  // What is on its way to her address is not read.
  await wire.openChannels();
  for (const [name, octets] of wire.written.splice(0)) {
    const contact = wire.contacts[name];
    await wire.do(name, contact.channelMessage(wire.now, contact.attempt.attemptId, octets));
  }
  for (const [name, octets] of wire.written.splice(0)) {
    const contact = wire.contacts[name];
    await wire.do(name, contact.channelMessage(wire.now, contact.attempt.attemptId, octets));
  }
  assert.deepEqual([alice.record.state, alice.record.seenSeq], ["paired", 0]);
  await wire.do("Alice", alice.unshare(wire.now));
  await wire.poll("Bob");
  assert.deepEqual([bob.record.state, bob.record.why], ["ended", "unshared"]);
});

test("an opener rotates by its first ready, whatever the clock shows", async () => {
  const wire = new Wire();
  const { bob } = await pair(wire);
  await wire.poll("Alice");
  const { address } = bob.record.current;
  Object.defineProperty(wire, "now", { get: () => ({ wallUs: 5, monotonicS: wire.nowS }) });
  await wire.poll("Bob");
  assert.equal(bob.record.state, "ready");
  assert.notEqual(bob.record.pending.address, address);
});

test("two who never connect replace their addresses all the same, and fall silent", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  for (const name of ["Alice", "Bob"]) {
    const contact = wire.contacts[name];
    await wire.do(name, contact.channelClosed(wire.now, contact.attempt.attemptId));
  }
  const first = [alice.record.current.keys, bob.record.current.keys];
  for (let day = 0; day < 65; day += 1) {
    wire.nowS += 86_400;
    await wire.rounds(3);
  }
  const kept = [alice, bob].flatMap(({ record: { current, pending, former } }) => (
    [current, pending, ...former].map((own) => own?.keys)));
  assert.ok(!kept.includes(first[0]) && !kept.includes(first[1]));
  assert.deepEqual([alice.record.pending, bob.record.pending], [null, null]);
  assert.deepEqual(states({ alice, bob }), ["apart", "apart"]);
});

/** Return two contacts that are not connected and have no pending address. */
async function pairAtRest(wire) {
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  for (const [name, contact] of Object.entries(wire.contacts)) {
    await wire.do(name, contact.disconnect(wire.now));
  }
  wire.nowS += 86_400;
  await wire.rounds(3);
  assert.deepEqual([alice.record.pending, bob.record.pending], [null, null]);
  return { alice, bob };
}

for (const step of [-1, 0, 1]) {
  test(`a former address stays for a month by itself: ${step} s more`, async () => {
    const wire = new Wire();
    const { alice } = await pairAtRest(wire);
    const addresses = [alice.record.current.address];
    const begunS = wire.nowS;
    const monthS = ROTATION_US / 1e6;
    for (const partS of [0, monthS / 2, monthS + step]) {
      wire.nowS = begunS + partS;
      // Nobody rotates by time meanwhile.
      await wire.do("Alice", alice.move(wire.now, RELAYS));
      const own = alice.record.pending;
      takeIntoUse(alice.machine, own);
      addresses.push(own.address);
    }
    const left = alice.record.former.map(({ address }) => address);
    assert.equal(left.includes(addresses[0]), step < 0);
    assert.deepEqual(left.slice(-2), addresses.slice(1, 3));
    // An older record has one time for all.
    const former = alice.record.former.map(({ address, keys }) => ({ address, keys }));
    const opened = checkRecord({ ...alice.record, former, leftUs: 5 });
    assert.deepEqual(opened.former, former.map((own) => ({ ...own, leftUs: 5 })));
    assert.throws(() => checkRecord({ ...alice.record, former, leftUs: "soon" }), /damaged/);
  });
}

/** Let a user change relays, and give up the attempt to connect. */
async function move(wire, name) {
  const contact = wire.contacts[name];
  await wire.do(name, contact.move(wire.now, RELAYS));
  await wire.do(name, contact.disconnect(wire.now));
  return contact.record.pending.address;
}

test("both change relays several times at once, and still meet", async () => {
  for (const moves of [1, 2, 3, MAX_REPLACED + 1]) {
    const wire = new Wire();
    const { alice, bob } = await pairAtRest(wire);
    const [firstOfAlice, firstOfBob] = [await move(wire, "Alice"), await move(wire, "Bob")];
    // Each learns the first new address of the other. What it writes there is lost.
    for (const [name, other] of [["Bob", alice], ["Alice", bob]]) {
      await wire.poll(name);
      wire.boxes.delete(parseAddress(other.record.pending.address)[0].pub);
    }
    for (let more = 1; more < moves; more += 1) {
      for (const name of ["Alice", "Bob"]) await move(wire, name);
    }
    assert.deepEqual(
      [bob.record.contactAddress, alice.record.contactAddress], [firstOfAlice, firstOfBob],
    );
    await wire.do("Bob", bob.connect(wire.now));
    await wire.rounds(40);
    assert.deepEqual(states({ alice, bob }), ["connected", "connected"]);
    wire.nowS += 86_400;
    await wire.rounds(3);
    for (const { record } of [alice, bob]) {
      assert.deepEqual([record.pending, record.replaced], [null, []]);
    }
  }
});

test("relays that the user has named are known while an address is there", async () => {
  const wire = new Wire();
  const { alice, bob } = await pairAtRest(wire);
  assert.deepEqual([alice.record.namedRelays, bob.record.namedRelays], [[RELAYS[0][0]], []]);
  const other = "http://127.0.0.1:7/";
  for (const name of ["Alice", "Bob"]) {
    const contact = wire.contacts[name];
    await wire.do(name, contact.move(wire.now, [[other, null]]));
    await wire.do(name, contact.disconnect(wire.now));
  }
  // Those of the link do not become Bob's own.
  assert.deepEqual([alice.record.namedRelays, bob.record.namedRelays], [
    [RELAYS[0][0], other], [other],
  ]);
});

/** Say whether one still polls the address that the other writes to. */
function isReachedBy({ record }, other) {
  return addressesOf(record).some(({ address }) => address === other.record.contactAddress);
}

test("whatever gets lost while both change relays, each polls where the other writes", async () => {
  for (let seed = 1; seed <= 10; seed += 1) {
    let state = seed;
    const random = (count) => {
      state = (state * 48_271) % 2_147_483_647;
      return state % count;
    };
    const wire = new Wire();
    const { alice, bob } = await pairAtRest(wire);
    const acts = [
      (name) => move(wire, name).catch((error) => assert.ok(error instanceof UsageError)),
      (name) => wire.poll(name),
      () => wire.boxes.clear(),
    ];
    for (let step = 0; step < 40; step += 1) {
      await acts[random(3)](["Alice", "Bob"][random(2)]);
      wire.nowS += 1;
      assert.ok(isReachedBy(alice, bob) && isReachedBy(bob, alice), `seed ${seed}, step ${step}`);
    }
    await wire.do("Bob", bob.connect(wire.now));
    await wire.rounds(40);
    assert.deepEqual(states({ alice, bob }), ["connected", "connected"], `seed ${seed}`);
  }
});

for (const [moves, isMade] of [
  [MAX_REPLACED, true], [MAX_REPLACED + 1, true], [MAX_REPLACED + 2, false],
]) {
  test(`${moves} changes of relays that nobody answers let go of no address`, async () => {
    const wire = new Wire();
    const { alice } = await pairAtRest(wire);
    const made = [];
    for (let count = 1; count < moves; count += 1) made.push(await move(wire, "Alice"));
    const before = alice.record;
    if (isMade) {
      made.push(await move(wire, "Alice"));
    } else {
      await assert.rejects(alice.move(wire.now, RELAYS), /not answered your last changes/);
      assert.equal(alice.record, before);
    }
    const polled = addressesOf(alice.record).map(({ address }) => address);
    assert.deepEqual(made.filter((address) => !polled.includes(address)), []);
  });
}

test("polling is fast while the other end is silent", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  wire.nowS += 1_000;
  for (const [name, contact] of Object.entries({ Alice: alice, Bob: bob })) {
    const { attemptId } = contact.attempt;
    await wire.do(name, contact.channelSilent(wire.now, attemptId - 1));
    assert.equal(contact.pollGapS(wire.now), POLL_SLOW_S);
    await wire.do(name, contact.channelSilent(wire.now, attemptId));
    assert.equal(contact.pollGapS(wire.now), POLL_FAST_S);
  }
});

test("with another network an attempt begins anew, and a connection goes on", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  assert.deepEqual(await bob.networkChanged(wire.now), []);
  for (const [name, contact] of Object.entries(wire.contacts)) {
    await wire.do(name, contact.channelClosed(wire.now, contact.attempt.attemptId));
    assert.deepEqual(await contact.networkChanged(wire.now), [], "nobody wants a connection");
  }
  await wire.do("Bob", bob.connect(wire.now));
  const { attemptId } = bob.attempt;
  bob.machine.failed = 3;
  await wire.do("Bob", bob.networkChanged(wire.now));
  assert.equal(bob.attempt.attemptId, attemptId + 1);
  assert.equal(bob.machine.failed, 0);
  await wire.rounds(4);
  assert.deepEqual(states({ alice, bob }), ["connected", "connected"]);
});

test("with a relay that is back an attempt begins anew, once a minute", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  assert.deepEqual(await bob.relayIsBack(wire.now), [], "it is connected");
  for (const [name, contact] of Object.entries(wire.contacts)) {
    await wire.do(name, contact.channelClosed(wire.now, contact.attempt.attemptId));
    assert.deepEqual(await contact.relayIsBack(wire.now), [], "nobody wants a connection");
  }
  await wire.do("Bob", bob.connect(wire.now));
  const { attemptId } = bob.attempt;
  for (const [seconds, attempts] of [[0, 1], [59, 1], [1, 2]]) {
    wire.nowS += seconds;
    await wire.do("Bob", bob.relayIsBack(wire.now));
    assert.equal(bob.attempt.attemptId, attemptId + attempts, `after ${seconds} s`);
  }
  await wire.do("Alice", alice.connect(wire.now));
  assert.deepEqual(await alice.relayIsBack(wire.now), [], "her call is out");
});

test("an answer to an offer that is not out is ignored", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  for (const contact of [alice, bob]) await contact.disconnect(wire.now);
  await wire.do("Bob", bob.connect(wire.now));
  // She answers, but he makes the next offer before he sees it.
  await wire.poll("Alice");
  await bob.disconnect(wire.now);
  const [{ attemptId }] = await bob.connect(wire.now);
  await bob.gathered(wire.now, attemptId, makeSdp("offer", "another"));
  await wire.poll("Bob");
  assert.equal(bob.attempt.state, "waiting");
});

test("attempts that connect nobody are told at once, and made every ten minutes", async () => {
  const wire = new Wire();
  const { bob } = await pair(wire);
  await wire.rounds(4);
  await wire.do("Bob", bob.channelClosed(wire.now, bob.attempt.attemptId));
  wire.told.length = 0;
  await wire.do("Bob", bob.connect(wire.now));
  const beganS = wire.nowS;
  const toldS = [];
  for (; wire.nowS < beganS + 800; wire.nowS += 1) {
    // Whatever they agree on, nothing comes of it.
    wire.open = false;
    const told = wire.told.splice(0).filter(([name]) => name === "Bob");
    for (const [, event] of told) toldS.push([event, Math.floor((wire.nowS - beganS) / 10)]);
    for (const [name, contact] of Object.entries(wire.contacts)) {
      await wire.poll(name);
      await wire.do(name, contact.tick(wire.now));
    }
  }
  // After the first attempt, after the third one, and after another one ten minutes later.
  assert.deepEqual(toldS, [["unreachable", 2], ["unreachable", 6], ["unreachable", 68]]);
});

/** Let somebody else open Alice's link, and return that contact. */
async function openToo(wire, name) {
  const invitation = readLink(wire.contacts.Alice.record.invitation);
  const [contact, effects] = await Contact.open(SUITE, wire.now, "Alice", invitation);
  wire.contacts[name] = contact;
  await wire.do(name, effects);
  return contact;
}

test("ten others who open a link hear soon that it is used, and later the next", async () => {
  const wire = new Wire();
  const { alice } = await pair(wire);
  await wire.rounds(4);
  const others = [];
  for (let number = 0; number < 11; number += 1) {
    others.push(await openToo(wire, `Eve ${number}`));
    await wire.poll("Alice");
  }
  await wire.round();
  const told = others.filter(({ record }) => record.why === "used");
  assert.equal(told.length, 10);
  assert.equal(alice.record.usedTo.length, 10);
  wire.nowS += 61;
  await wire.rounds(2);
  assert.equal(others[10].record.why, "used");
  assert.equal(alice.record.usedTo.length, 11);
});

for (const [afterS, times] of [[-1, 1], [0, 2], [1, 2]]) {
  test(`what others can repeat, ${afterS} s after an hour, is told ${times} times`, async () => {
    const wire = new Wire();
    const [{ machine }] = await Contact.invite(SUITE, wire.now, "Bob", RELAYS);
    const told = [];
    const { nowS } = wire;
    for (const atS of [0, 1, TELL_EVERY_S + afterS]) {
      wire.nowS = nowS + atS;
      told.push(...await machine.step(wire.now, async () => {
        for (const event of [...REPEATABLE, "disconnected"]) machine.tell(event);
      }));
    }
    for (const event of REPEATABLE) {
      assert.equal(told.filter((effect) => effect.event === event).length, times);
    }
    assert.equal(told.filter(({ event }) => event === "disconnected").length, 3);
  });
}

for (const [relayReplies, told] of [[true, "unreachable"], [false, "unsent"]]) {
  test(`an answer without a channel is ${told}, if relayReplies is ${relayReplies}`, async () => {
    const wire = new Wire();
    const { alice, bob } = await pair(wire);
    await wire.rounds(4);
    for (const [name, contact] of Object.entries(wire.contacts)) {
      await wire.do(name, contact.channelClosed(wire.now, contact.attempt.attemptId));
    }
    await wire.do("Bob", bob.connect(wire.now));
    wire.relayReplies = relayReplies;
    const before = wire.told.length;
    await wire.poll("Alice");
    assert.equal(alice.attempt.state, "joining");
    wire.nowS += AGAIN_AFTER_ANSWER_S;
    await wire.do("Alice", alice.tick(wire.now));
    assert.deepEqual(wire.told.slice(before), [["Alice", told]]);
  });
}

for (const [messages, count] of [[63, 0], [64, 1], [65, 1], [200, 1]]) {
  test(`a link that got ${messages} messages makes ${count} warnings of a flood`, async () => {
    const wire = new Wire();
    const [alice, invited] = await Contact.invite(SUITE, wire.now, "Bob", RELAYS);
    wire.contacts.Alice = alice;
    await wire.do("Alice", invited);
    const [mailbox] = alice.mailboxes;
    for (let number = 0; number < messages; number += 1) {
      wire.deliver({ mailbox, data: `QUJD${number}` });
      if (number === 9) await wire.poll("Alice");
    }
    await wire.poll("Alice");
    await wire.poll("Alice");
    assert.deepEqual(wire.told, Array(count).fill(["Alice", "flooded"]));
  });
}

test("whom only a newer app could understand is told once, and the link stays good", async () => {
  const wire = new Wire();
  const [alice, invited] = await Contact.invite(SUITE, wire.now, "Bob", RELAYS);
  wire.contacts.Alice = alice;
  await wire.do("Alice", invited);
  const before = alice.record;
  const [mailbox] = alice.mailboxes;
  for (const versions of [[3], [3, 4]]) {
    const hello = await helloOf(before.invitation, { versions });
    wire.deliver({ mailbox, data: await sealMessage(SUITE, mailbox.pub, hello) });
  }
  await wire.poll("Alice");
  assert.deepEqual(wire.told, [["Alice", "needs_newer_app"]]);
  assert.deepEqual([alice.dropped, alice.record], [{ version: 2 }, before]);
  const hello = await helloOf(before.invitation, { versions: [1, 3] });
  wire.deliver({ mailbox, data: await sealMessage(SUITE, mailbox.pub, hello) });
  await wire.poll("Alice");
  assert.deepEqual([alice.record.state, alice.record.protocol], ["welcomed", 1]);
});

/** Return a hello to an invitation, from a stranger, with more members. */
async function helloOf(invitation, members) {
  const [[key, from], [, pub]] = [await SUITE.makeKey("ECDSA"), await SUITE.makeKey("ECDH")];
  const { address, secret } = parseInvitation(invitation, { allowHttp: true });
  const [url] = RELAYS[0];
  const jws = await signJws(SUITE, key, {
    type: "hello",
    to: address,
    from,
    seq: 1,
    re: null,
    connectoid: formatAddress([{ pub, url, ext: null }]),
    nonce: "A".repeat(22),
    sdpOffer: makeSdp("offer"),
    ...members,
  });
  return `${jws}.${await prove(secret, jws)}`;
}

test("events of one contact do not interleave", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  const results = await Promise.all([
    alice.disconnect(wire.now), alice.connect(wire.now), alice.disconnect(wire.now),
    alice.connect(wire.now), alice.unshare(wire.now),
  ]);
  const saves = results.flat().filter((effect) => effect.do === "save");
  const seqs = saves.map(({ record }) => record.seq);
  assert.deepEqual(seqs, [...new Set(seqs)].sort((one, other) => one - other));
  const first = results.map(([effect]) => effect.do);
  assert.deepEqual(first, ["close", "save", "close", "save", "save"]);
  assert.equal(bob.attempt.state, "connected");
});

test("a step that fails changes nothing", async () => {
  const wire = new Wire();
  const { alice } = await pair(wire);
  const before = alice.record;
  await assert.rejects(alice.verify(wire.now), UsageError);
  await assert.rejects(alice.move(wire.now, RELAYS), UsageError);
  assert.equal(alice.record, before);
  const [bob] = await Contact.open(SUITE, wire.now, "Alice", readLink(before.invitation));
  const opened = bob.record;
  const sdp = { type: "offer", sdp: "x".repeat(20_000) };
  await assert.rejects(bob.gathered(wire.now, 1, sdp), UsageError);
  assert.equal(bob.record, opened);
  assert.equal(bob.attempt.state, "gathering");
});

const LONG_EXT = "x".repeat(1_000);
const BAD_RELAYS = {
  none: [],
  "three long ones": ["a", "b", "c"].map((name) => [`https://${name}.example.com/`, LONG_EXT]),
  "a lone surrogate": [["https://a.example.com/", "\ud800"]],
  "http elsewhere": [["http://relay.example.com/", null]],
};
for (const [name, relays] of Object.entries(BAD_RELAYS)) {
  test(`relays that cannot be used are refused: ${name}`, async () => {
    await assert.rejects(Contact.invite(SUITE, new Wire().now, "Bob", relays), UsageError);
  });
}

test("an address that is too long is told with the limit", async () => {
  const relays = BAD_RELAYS["three long ones"];
  await assert.rejects(Contact.invite(SUITE, new Wire().now, "Bob", relays), /4096 characters/);
});

const PRINT_TABLES = `import connectoid, json
tables = (connectoid.PAIRING, connectoid.CONNECTING)
print(json.dumps([[[r.state, r.event, list(r.then)] for r in t.values()] for t in tables]))
`;

test("the tables are those of Python", async () => {
  const python = await startPython(["-c", PRINT_TABLES], { cwd: here(".") });
  let text = "";
  for await (const part of python.stdout) text += part;
  const rows = (table) => [...table.values()].map(({ state, event, then }) => (
    [state, event, then]));
  assert.deepEqual([rows(PAIRING), rows(CONNECTING)], JSON.parse(text));
});

test("the tables hold functions", () => {
  for (const { does } of [...PAIRING.values(), ...CONNECTING.values()]) {
    assert.equal(typeof does, "function");
  }
});

test("a record that was kept before there were some members is read without them", async () => {
  const { alice } = await pair(new Wire());
  const { differs, replaced, namedRelays, ...older } = alice.record;
  assert.deepEqual([differs, replaced, namedRelays], [false, [], [RELAYS[0][0]]]);
  assert.deepEqual(checkRecord({ ...older, relaysNamed: true }), alice.record);
  for (const relaysNamed of [false, undefined]) {
    const record = { ...alice.record, namedRelays: [] };
    assert.deepEqual(checkRecord({ ...older, relaysNamed }), record);
  }
});

test("a damaged record is refused", () => {
  const old = { version: 1, relaysNamed: true };
  for (const record of [null, 1, "x", [], {}, { version: 1 }, old, { ...old, relays: [1] }]) {
    assert.throws(() => checkRecord(record), RecordError);
  }
  assert.throws(() => checkRecord({ version: 2 }), /another version/);
});

test("an inviter who asks first answers no offer before the app wants to connect", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  alice.privacy = { askFirst: true };
  await wire.rounds(5);
  assert.deepEqual([alice.record.state, bob.record.state], ["paired", "paired"]);
  assert.equal(alice.attempt.attemptId, 0);
  const told = wire.told.filter(([name]) => name === "Alice").map(([, event]) => event);
  assert.deepEqual(told, ["paired", "wants_to_connect"]);
  await wire.do("Alice", alice.connect(wire.now));
  await wire.rounds(5);
  assert.deepEqual(states({ alice, bob }), ["connected", "connected"]);
});

test("an opener who asks first makes no offer before the app wants to connect", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(5);
  await wire.do("Alice", alice.disconnect(wire.now));
  await wire.do("Bob", bob.disconnect(wire.now));
  bob.privacy = { askFirst: true };
  const { attemptId } = bob.attempt;
  await wire.do("Alice", alice.connect(wire.now));
  await wire.rounds(3);
  assert.equal(bob.attempt.attemptId, attemptId);
  assert.deepEqual(wire.told.at(-1), ["Bob", "wants_to_connect"]);
  await wire.do("Bob", bob.connect(wire.now));
  await wire.rounds(5);
  assert.deepEqual(states({ alice, bob }), ["connected", "connected"]);
});

// -- Whoever runs a relay sees who writes to it ------------------------------------------

const ELSEWHERE = "http://127.0.0.1:7/";
const FARTHER = "http://127.0.0.1:5/";

/** Let two contacts connect and part; Alice asks first, and Bob has moved to other relays. */
async function movedAway(...urls) {
  const wire = new Wire();
  wire.urls.push(ELSEWHERE, FARTHER);
  const { alice, bob } = await pair(wire);
  await wire.rounds(6);
  for (const [name, contact] of Object.entries(wire.contacts)) {
    await wire.do(name, contact.disconnect(wire.now));
  }
  alice.privacy = { askFirst: true };
  wire.nowS += 61;
  await wire.do("Bob", bob.move(wire.now, urls.map((url) => [url, null])));
  return { wire, alice, bob };
}

/** Return the relays that get something, and do it. */
async function writtenTo(wire, name, promise) {
  const effects = await promise;
  await wire.do(name, effects);
  return effects.filter((effect) => effect.do === "send").map(({ mailbox: { url } }) => url);
}

test("a relay that a contact newly names gets nothing before the app connects", async () => {
  const { wire, alice, bob } = await movedAway(ELSEWHERE);
  const before = wire.at;
  await wire.poll("Alice");
  assert.equal(wire.at, before);
  assert.deepEqual(wire.told.at(-1), ["Alice", "wants_to_connect"]);
  assert.deepEqual(alice.record.met, [RELAYS[0][0]]);
  assert.deepEqual(await writtenTo(wire, "Alice", alice.connect(wire.now)), [ELSEWHERE]);
  assert.deepEqual(alice.record.met, [ELSEWHERE]);
  assert.deepEqual(wire.saved.Alice.met, [ELSEWHERE]);
  await wire.rounds(6);
  assert.deepEqual(states({ alice, bob }), ["connected", "connected"]);
});

for (const act of ["unshare", "renew"]) {
  test(`${act} goes to a relay that a contact newly names at once, and again`, async () => {
    const { wire, alice, bob } = await movedAway(ELSEWHERE);
    await wire.poll("Alice");
    const first = await writtenTo(wire, "Alice", alice[act](wire.now));
    assert.deepEqual([...new Set(first)], [ELSEWHERE]);
    await wire.do("Bob", bob.move(wire.now, [[FARTHER, null]]));
    await wire.poll("Alice");
    wire.nowS += AGAIN_IDLE_S;
    const again = await writtenTo(wire, "Alice", alice.tick(wire.now));
    assert.deepEqual([...new Set(again)], [FARTHER]);
  });
}

test("a welcome to a new relay waits for the app, and goes out once", async () => {
  const wire = new Wire();
  wire.urls.push(ELSEWHERE);
  const [alice, invited] = await Contact.invite(SUITE, wire.now, "Bob", RELAYS);
  wire.contacts.Alice = alice;
  alice.privacy = { askFirst: true };
  await wire.do("Alice", invited);
  const invitation = readLink(alice.record.invitation);
  const relays = [[ELSEWHERE, null]];
  const [bob, opened] = await Contact.open(SUITE, wire.now, "Alice", invitation, { relays });
  wire.contacts.Bob = bob;
  await wire.do("Bob", opened);
  const before = wire.at;
  await wire.poll("Alice");
  assert.deepEqual([alice.record.state, wire.at], ["welcomed", before]);
  assert.deepEqual(wire.told, [["Alice", "wants_to_connect"]]);
  assert.deepEqual(await writtenTo(wire, "Alice", alice.connect(wire.now)), [ELSEWHERE]);
  assert.deepEqual(await writtenTo(wire, "Alice", alice.connect(wire.now)), []);
  await wire.rounds(8);
  assert.deepEqual(states({ alice, bob }), ["connected", "connected"]);
});

test("a record from before relays were met has met those of the contact", async () => {
  const { alice } = await pair(new Wire());
  for (const [address, met] of [[alice.record.invited.address, [RELAYS[0][0]]], ["", []]]) {
    const { met: _, ...older } = { ...alice.record, contactAddress: address };
    assert.deepEqual(checkRecord(older).met, met);
  }
});

const CANDIDATE = `a=candidate:1 1 udp 1 2001:db8::1 54321 typ srflx ${"x".repeat(190)}\r\n`;

/** A wire where WebRTC gathers as many long candidates as an SDP may have. */
class LongWire extends Wire {
  offers = [];

  async gather(name, { attemptId, offer }) {
    if (offer) this.offers.push(offer.sdp);
    const { type, sdp } = makeSdp(offer ? "answer" : "offer", name);
    const long = { type, sdp: sdp + CANDIDATE.repeat(MAX_CANDIDATES) };
    await this.do(name, this.contacts[name].gathered(this.now, attemptId, long));
  }
}

/** Return three relays whose address is as long as one may be. */
function longestRelays(host) {
  const start = `https://${host}/`;
  const url = start + "a".repeat(MAX_URL_CHARS - start.length);
  return [459, 460, 461].map((count) => [url, "A".repeat(count)]);
}

test("two sides with the longest addresses pair, and offer what has room", async () => {
  const wire = new LongWire();
  const app = "a".repeat(MAX_APP_CHARS);
  const relays = longestRelays("alice.example.com");
  const [alice, invited] = await Contact.invite(SUITE, wire.now, "Bob", relays, { app });
  assert.equal(alice.record.invited.address.length, MAX_ADDRESS_CHARS);
  wire.contacts.Alice = alice;
  await wire.do("Alice", invited);
  const [bob, opened] = await Contact.open(
    SUITE, wire.now, "Alice", readLink(alice.record.invitation),
    { app, relays: longestRelays("bob.example.com") });
  wire.contacts.Bob = bob;
  await wire.do("Bob", opened);
  wire.urls = [relays[0][0], longestRelays("bob.example.com")[0][0]];
  for (const name of ["Alice", "Bob", "Alice"]) await wire.poll(name);
  assert.deepEqual([alice.record.state, bob.record.state], ["paired", "ready"]);
  const count = wire.offers[0].split("a=candidate").length - 1;
  assert.ok(count > 0 && count < MAX_CANDIDATES);
});

test("so many messages are read in a step, and the others in the next", async () => {
  for (const more of [-1, 0, 1]) {
    const wire = new Wire();
    const { alice } = await pair(wire);
    const [{ mailbox: { pub } }] = alice.polls(wire.now, RELAYS[0][0]);
    const count = MAX_STEP_MESSAGES + more;
    const found = Array.from({ length: count }, (_, at) => [at + 1, `QUJ${at}`]);
    await alice.polledInPart(wire.now, new Map([[pub, found]]));
    assert.equal(alice.isBehind, more > 0);
    await alice.polledInPart(wire.now);
    assert.ok(!alice.isBehind);
    assert.equal(Object.values(alice.dropped).reduce((sum, one) => sum + one), count);
  }
});

test("what a contact is asked does not wait for a flood of its messages", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  const { contactAddress: to, privateKey, signer, seq } = bob.record;
  const own = addressesOf(alice.record).find(({ address }) => address === to);
  const [{ pub }] = parseAddress(to, { allowHttp: true });
  const [{ address: connectoid }] = addressesOf(bob.record).slice(-1);
  const found = [];
  for (let number = 1; number <= 4 * MAX_STEP_MESSAGES; number += 1) {
    const payload = { type: "moved", to, from: signer, seq: seq + number, re: null, connectoid };
    const data = await sealMessage(SUITE, pub, await signJws(SUITE, privateKey, payload));
    found.push([number, data]);
  }
  assert.ok(own);
  const first = alice.polledInPart(wire.now, new Map([[pub, found]]));
  await alice.verify(wire.now);
  await first;
  assert.ok(alice.isBehind);
  while (alice.isBehind) await alice.polledInPart(wire.now);
  assert.equal(alice.record.seenSeq, seq + found.length);
});
