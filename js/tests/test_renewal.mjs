/** A new signing key: the owner renews, and a copy of the device from before is shut out. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { Contact, UsageError, checkRecord, readLink } from "../connectoid.js";
import { addressesOf } from "../contact/record.js";
import { noteSaid, provenOctets } from "../contact/renewal.js";
import { encodeBase64url } from "../encoding.js";
import { ROUTINE } from "../errors.js";
import {
  AGAIN_IDLE_S, MAX_RENEWAL_ANSWERS, MAX_RENEWAL_HASHES, MAX_SEQ_AHEAD_US, TELL_EVERY_S,
} from "../limits.js";
import { openMessage, readJws, sealMessage, signJws } from "../messages.js";
import { prove } from "../suite.js";
import { RELAYS, SUITE, Wire, makeSdp, pair } from "./harness.mjs";

/** Let two pair, and leave the connection. */
async function apart() {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await wire.rounds(4);
  for (const [name, contact] of Object.entries(wire.contacts)) {
    await wire.do(name, contact.channelClosed(wire.now, contact.attempt.attemptId));
  }
  return { wire, alice, bob };
}

/** Return who has a name, and the other one. */
function sides({ wire, alice, bob }, name) {
  return name === "Alice"
    ? { wire, owner: alice, other: bob, otherName: "Bob" }
    : { wire, owner: bob, other: alice, otherName: "Alice" };
}

/** Make a contact anew from its record, as a thief does, or an app that starts again. */
function copied(contact) {
  return new Contact(SUITE, checkRecord({ ...contact.record }));
}

/** Return a message that a contact's own key signs, whatever it says. */
function signedBy({ record }, type, to, members) {
  return signJws(SUITE, record.privateKey, {
    type,
    to,
    from: record.signer,
    re: null,
    connectoid: (record.pending ?? record.current).address,
    ...members,
  });
}

/** Put a text into the newest mailbox of a contact. */
async function put(wire, contact, text) {
  const { pending, current } = contact.record;
  const { address } = pending ?? current;
  const mailbox = contact.mailboxes.find(({ pub }) => address.startsWith(pub));
  wire.deliver({ mailbox, data: await sealMessage(SUITE, mailbox.pub, text) });
}

/** Put a `renew` by a thief, with a key of his own, into the newest mailbox of a contact. */
async function putRenewal(wire, contact, thief, seq) {
  const { pending, current } = contact.record;
  const [key, next] = await SUITE.makeKey("ECDSA");
  const { signer, linkHash } = thief.record;
  const own = thief.record.pending ?? thief.record.current;
  const octets = await provenOctets(signer, next, linkHash, own.address);
  const proof = encodeBase64url(await SUITE.sign(key, octets));
  const { address } = pending ?? current;
  await put(wire, contact, await signedBy(thief, "renew", address, { seq, next, proof }));
}

/** Return the events of a kind that somebody was told. */
function toldOf(wire, name, event) {
  return wire.told.filter((told) => told[0] === name && told[1] === event).length;
}

function assertAgreed(one, other) {
  assert.deepEqual(
    [one.record.contact, other.record.contact], [other.record.signer, one.record.signer]);
  for (const { record } of [one, other]) {
    assert.deepEqual([record.oldSigner, record.oldPrivateKey], ["", null]);
  }
}

for (const name of ["Alice", "Bob"]) {
  test(`${name} renews: key and address are new, both are told, and they connect`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    const before = owner.record;
    await wire.do(name, owner.renew(wire.now));
    assert.deepEqual(
      [owner.record.oldSigner, owner.record.oldPrivateKey], [before.signer, before.privateKey]);
    assert.equal(wire.saved[name], owner.record);
    await wire.rounds(4);
    assertAgreed(owner, other);
    assert.notEqual(owner.record.signer, before.signer);
    assert.equal(owner.record.current.address, other.record.contactAddress);
    assert.notEqual(owner.record.current.address, before.current.address);
    assert.equal(owner.record.welcome, "");
    assert.ok(wire.told.some(([who, event]) => who === name && event === "renewed"));
    assert.ok(wire.told.some(([who, event]) => who === otherName && event === "contact_renewed"));
    await wire.do(name, owner.connect(wire.now));
    await wire.rounds(6);
    assert.deepEqual([owner.attempt.state, other.attempt.state], ["connected", "connected"]);
  });

  test(`a copy of ${name}'s device is shut out after the renewal`, async () => {
    const { wire, owner, other } = sides(await apart(), name);
    const thief = copied(owner);
    await wire.do(name, owner.renew(wire.now));
    await wire.rounds(4);
    const before = other.record;
    const { address } = before.pending ?? before.current;
    for (const [place, type] of ["moved", "unshare", "unshare"].entries()) {
      const seq = place === 2 ? 2 ** 53 - 1 : wire.now.wallUs + place;
      await put(wire, other, await signedBy(thief, type, address, { seq }));
    }
    // He renews too, and is second.
    const late = await thief.renew(wire.now);
    for (const effect of late) if (effect.do === "send") wire.deliver(effect);
    await wire.rounds(2);
    assert.equal(other.record, before);
    // His own renewal shows that he is there. The rest may have been late.
    assert.ok(other.dropped.sender >= 1);
    assert.ok(other.dropped.replaced >= 3);
  });

  test(`what ${name} signed before a renewal, and comes late, is no refusal`, async () => {
    const { wire, owner, other } = sides(await apart(), name);
    const { address } = other.record.pending ?? other.record.current;
    const late = await signedBy(owner, "unshare", address, { seq: wire.now.wallUs });
    await wire.do(name, owner.renew(wire.now));
    await wire.rounds(4);
    const before = other.record;
    await put(wire, other, late);
    await wire.rounds(1);
    assert.equal(other.record, before);
    assert.equal(other.dropped.replaced, 1);
    assert.ok(Object.keys(other.dropped).every((reason) => ROUTINE.includes(reason)));
  });

  test(`a thief who answers ${name}'s renewal does not keep the contact's out`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    // An earlier one, after which no address of the owner is pending.
    await wire.do(name, owner.renew(wire.now));
    await wire.rounds(4);
    // He has a copy of the contact's device, which does not hear of the new key.
    const thief = copied(other);
    wire.contacts[otherName] = thief;
    await wire.do(name, owner.renew(wire.now));
    await wire.rounds(4);
    assert.equal(owner.record.oldSigner, "");
    wire.contacts[otherName] = other;
    wire.boxes.clear();
    await wire.do(otherName, other.renew(wire.now));
    await wire.poll(name);
    assert.equal(owner.dropped.proof, undefined);
    assert.equal(owner.record.contact, other.record.signer);
    assert.notEqual(owner.record.contact, thief.record.signer);
  });

  test(`a channel of a thief of ${name}'s device is closed by the renewal`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    const thief = copied(owner);
    wire.contacts[name] = thief;
    await wire.do(name, thief.connect(wire.now));
    await wire.rounds(6);
    assert.deepEqual([thief.attempt.state, other.attempt.state], ["connected", "connected"]);
    wire.contacts[name] = owner;
    await wire.do(name, owner.renew(wire.now));
    wire.told.length = 0;
    await wire.poll(otherName);
    assert.equal(other.attempt.state, "apart");
    assert.deepEqual(
      wire.told, [[otherName, "contact_renewed"], [otherName, "disconnected"]]);
  });

  test(`a thief's high number does not keep ${name}'s renewal from counting`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    const thief = copied(owner);
    const { pending, current } = other.record;
    const high = wire.now.wallUs + MAX_SEQ_AHEAD_US;
    const members = { seq: high, sdpOffer: makeSdp("offer") };
    const type = name === "Alice" ? "call" : "offer";
    const { address } = pending ?? current;
    await put(wire, other, await signedBy(thief, type, address, members));
    await wire.poll(otherName);
    assert.equal(other.record.seenSeq, high);
    await wire.do(name, owner.renew(wire.now));
    await wire.rounds(4);
    assertAgreed(owner, other);
  });

  for (const seq of [1, 2 ** 53 - 1]) {
    test(`two renewals of ${name} in a round do not count, the other's seq is ${seq}`, async () => {
      const { wire, owner, other, otherName } = sides(await apart(), name);
      const thief = copied(owner);
      await wire.do(name, owner.renew(wire.now));
      await putRenewal(wire, other, thief, seq);
      await wire.poll(otherName);
      assert.equal(other.record.contact, thief.record.signer);
      assert.equal(other.record.keyNews, "copied");
      assert.equal(other.dropped.copied, 2);
      // Nor does one that comes alone, after a restart either.
      const again = copied(other);
      wire.contacts[otherName] = again;
      wire.boxes.clear();
      await putRenewal(wire, again, thief, seq);
      await wire.poll(otherName);
      assert.deepEqual(again.dropped, { copied: 1 });
      assert.equal(again.record.contact, thief.record.signer);
      assert.equal(toldOf(wire, otherName, "copied"), 1);
      // The user has asked, and says that all is well.
      await wire.do(otherName, again.verify(wire.now, { same: false }));
      assert.equal(again.record.keyNews, "copied");
      await wire.do(otherName, again.verify(wire.now));
      assert.equal(again.record.keyNews, "");
      wire.boxes.clear();
      wire.nowS += AGAIN_IDLE_S;
      await wire.do(name, owner.tick(wire.now));
      await wire.rounds(4);
      assertAgreed(owner, again);
      assert.equal(again.record.keyNews, "renewed");
    });
  }

  test(`a thief cannot join a proof of ${name}'s with an address of his own`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    const thief = copied(owner);
    const [renewal] = (await owner.renew(wire.now)).filter((effect) => effect.do === "send");
    const { pending, current } = other.record;
    const own = pending ?? current;
    const read = await readJws(await openMessage(SUITE, own.keys[0], renewal.data));
    assert.equal(read.type, "renew");
    const { to, next, proof } = read.payload;
    // Any address but the one that the owner has proven: here his former one.
    const connectoid = thief.record.current.address;
    const members = { seq: wire.now.wallUs, next, proof, connectoid };
    await put(wire, other, await signedBy(thief, "renew", to, members));
    await wire.poll(otherName);
    assert.deepEqual(other.dropped, { proof: 1 });
    assert.equal(other.record.contact, thief.record.signer);
    wire.nowS += AGAIN_IDLE_S;
    await wire.do(name, owner.tick(wire.now));
    await wire.rounds(4);
    assertAgreed(owner, other);
  });

  test(`a copy of ${name}'s device that answers each move does not keep her out`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    const thief = copied(owner);
    for (let count = 0; count < 6; count += 1) {
      await wire.do(otherName, other.move(wire.now, RELAYS));
      const { address } = other.record.pending;
      const members = { seq: other.record.seenSeq + 1, re: encodeBase64url(new Uint8Array(32)) };
      await put(wire, other, await signedBy(thief, "moved", address, members));
      await wire.poll(otherName);
      assert.equal(other.record.current.address, address);
    }
    wire.contacts[name] = owner;
    await wire.do(name, owner.unshare(wire.now));
    await wire.poll(otherName);
    assert.equal(other.record.why, "unshared");
  });

  for (const renews of [true, false]) {
    const when = renews ? "while she renews" : "of the same key";
    test(`a thief's renewal does not keep ${name}'s unshare from counting, ${when}`, async () => {
      const { wire, owner, other, otherName } = sides(await apart(), name);
      const thief = copied(owner);
      if (renews) {
        await wire.do(name, owner.renew(wire.now));
        await putRenewal(wire, other, thief, 1);
        await wire.poll(otherName);
        assert.equal(other.record.keyNews, "copied");
      }
      await wire.do(name, owner.unshare(wire.now));
      await putRenewal(wire, other, thief, 2);
      await wire.poll(otherName);
      assert.equal(other.record.why, "unshared");
    });
  }

  test(`a request of a thief of ${name}'s device that waits goes with the renewal`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    other.privacy = { askFirst: true };
    const thief = copied(owner);
    const members = { seq: wire.now.wallUs, sdpOffer: makeSdp("offer") };
    const type = name === "Alice" ? "call" : "offer";
    const { address } = other.record.pending ?? other.record.current;
    await put(wire, other, await signedBy(thief, type, address, members));
    await wire.poll(otherName);
    assert.notEqual(other.machine.asked, null);
    await wire.do(name, owner.renew(wire.now));
    await wire.poll(otherName);
    assert.equal(other.machine.asked, null);
  });

  test(`a lost renewal of ${name} is repeated within the hour, and at a start`, async () => {
    const { wire, owner, other } = sides(await apart(), name);
    await wire.do(name, owner.renew(wire.now));
    wire.boxes.clear();
    assert.ok(owner.nextTickS <= wire.nowS + AGAIN_IDLE_S);
    wire.nowS += AGAIN_IDLE_S;
    const sent = (await owner.tick(wire.now)).filter((effect) => effect.do === "send");
    assert.equal(sent.length, 2);
    const again = copied(owner);
    wire.contacts[name] = again;
    await wire.rounds(6);
    assertAgreed(again, other);
    assert.deepEqual(other.dropped, {});
  });
}

for (const name of ["Alice", "Bob"]) {
  test(`a thief who announces ${name}'s new address completes no renewal`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    const thief = copied(owner);
    await wire.do(name, owner.renew(wire.now));
    // The relay drops the renewal, and tells him the address. The contact writes there.
    wire.boxes.clear();
    const { address } = other.record.pending ?? other.record.current;
    const connectoid = owner.record.pending.address;
    for (const re of [null, encodeBase64url(new Uint8Array(32))]) {
      await put(wire, other, await signedBy(
        thief, "moved", address, { seq: wire.now.wallUs, re, connectoid }));
      wire.nowS += 60;
      await wire.poll(otherName);
      await wire.poll(name);
    }
    assert.equal(owner.record.current.address, connectoid);
    assert.equal(owner.record.oldSigner, other.record.contact);
    assert.equal(toldOf(wire, name, "renewed"), 0);
    // Her next word is heard all the same.
    const again = copied(owner);
    wire.contacts[name] = again;
    await wire.do(name, again.tick(wire.now));
    await wire.rounds(4);
    assertAgreed(again, other);
    assert.equal(toldOf(wire, name, "renewed"), 1);
  });

  for (const step of [1, 0, -1]) {
    const later = MAX_RENEWAL_HASHES - step;
    const counts = step > 0;
    test(`an answer to what ${name} said ${later} words ago counts: ${counts}`, async () => {
      const { wire, owner, other } = sides(await apart(), name);
      await wire.do(name, owner.renew(wire.now));
      const re = owner.record.renewalHashes.at(-1);
      for (let number = 0; number < later; number += 1) noteSaid(owner.machine, `${number}`);
      assert.ok(owner.record.renewalHashes.length <= MAX_RENEWAL_HASHES);
      wire.boxes.clear();
      const { address } = owner.record.pending;
      await put(wire, owner, await signedBy(other, "moved", address, { seq: wire.now.wallUs, re }));
      await wire.poll(name);
      assert.equal(owner.record.oldSigner === "", counts);
      assert.equal(toldOf(wire, name, "renewed"), counts ? 1 : 0);
      assert.equal(owner.record.renewalHashes.length === 0, counts);
    });
  }
}

test("a channel over what the new key has signed completes a renewal", async () => {
  const { wire, alice, bob } = await apart();
  await wire.do("Alice", alice.renew(wire.now));
  await wire.poll("Bob");
  // His answer is lost, and nobody has called for his offer.
  wire.boxes.clear();
  assert.notEqual(alice.record.oldSigner, "");
  await wire.do("Bob", bob.connect(wire.now));
  await wire.rounds(6);
  assert.deepEqual([alice.attempt.state, bob.attempt.state], ["connected", "connected"]);
  assertAgreed(alice, bob);
  assert.equal(toldOf(wire, "Alice", "renewed"), 1);
});

test("both may renew at once", async () => {
  const { wire, alice, bob } = await apart();
  await Promise.all(["Alice", "Bob"].map((name) => (
    wire.do(name, wire.contacts[name].renew(wire.now)))));
  await wire.rounds(6);
  assertAgreed(alice, bob);
  assert.deepEqual(Object.keys({ ...alice.dropped, ...bob.dropped }), ["replay"]);
});

for (const first of ["pending", "current"]) {
  test(`both may renew at once, the ${first} mailbox is read first`, async () => {
    const { wire, alice, bob } = await apart();
    for (const [name, contact] of Object.entries(wire.contacts)) {
      await wire.do(name, contact.renew(wire.now));
    }
    await wire.poll("Alice");
    const pub = bob.record[first].address.split(".")[0];
    const found = bob.mailboxes.map((mailbox) => [mailbox.pub, wire.boxes.get(mailbox.pub) ?? []]);
    const isFirst = ([box]) => box === pub;
    await wire.do("Bob", bob.polled(wire.now, new Map(found.filter(isFirst))));
    await wire.do("Bob", bob.polled(wire.now, new Map(found.filter((box) => !isFirst(box)))));
    await wire.poll("Alice");
    assertAgreed(alice, bob);
  });
}

test("who renews and leaves before the answer is heard all the same", async () => {
  const { wire, alice, bob } = await apart();
  await wire.do("Alice", alice.renew(wire.now));
  await wire.poll("Bob");
  await wire.do("Alice", alice.unshare(wire.now));
  await wire.poll("Bob");
  assert.equal(bob.record.why, "unshared");
});

test("who has left is told nothing of a new key, and tells it that it is over", async () => {
  const { wire, alice, bob } = await apart();
  await wire.do("Bob", bob.unshare(wire.now));
  wire.boxes.clear();
  await wire.do("Alice", alice.renew(wire.now));
  wire.nowS += 61;
  wire.told.length = 0;
  await wire.poll("Bob");
  assert.equal(bob.record.contact, alice.record.signer);
  await wire.poll("Alice");
  assert.deepEqual(wire.told, [["Alice", "renewed"], ["Alice", "unshared"]]);
  assert.equal(alice.record.why, "unshared");
});

test("a renewal is a mistake too early, twice, or with an older app", async () => {
  const wire = new Wire();
  const { alice, bob } = await pair(wire);
  await assert.rejects(alice.renew(wire.now), /know each other/);
  await assert.rejects(bob.renew(wire.now), UsageError);
  await wire.rounds(4);
  const old = new Contact(SUITE, { ...bob.record, protocol: 1 });
  const before = old.record;
  await assert.rejects(old.renew(wire.now), /older app/);
  assert.equal(old.record, before);
  await alice.renew(wire.now);
  await assert.rejects(alice.renew(wire.now), /not answered/);
});

test("a record from before there were renewals opens", async () => {
  const { alice } = await apart();
  const { oldPrivateKey, oldSigner, renewalHashes, formerContact, ...before } = alice.record;
  assert.deepEqual([oldPrivateKey, oldSigner, formerContact], [null, "", ""]);
  assert.deepEqual(renewalHashes, []);
  assert.deepEqual(checkRecord(before), alice.record);
});

/** Let somebody open a link; return the contact. */
async function openLink(wire, name, invitation) {
  const [contact, effects] = await Contact.open(SUITE, wire.now, "Alice", invitation);
  wire.contacts[name] = contact;
  await wire.do(name, effects);
  return contact;
}

test("who opens the link of one who has renewed hears that it is used", async () => {
  const { wire, alice, bob } = await apart();
  const link = readLink(alice.record.invitation);
  const { signer, privateKey } = alice.record;
  for (let number = 0; number < 2; number += 1) {
    await wire.do("Alice", alice.renew(wire.now));
    await wire.rounds(4);
    assertAgreed(alice, bob);
  }
  const { linkSigner, linkPrivateKey } = checkRecord(alice.record);
  assert.deepEqual([linkSigner, linkPrivateKey], [signer, privateKey]);
  const eve = await openLink(wire, "Eve", link);
  await wire.rounds(2);
  assert.equal(eve.record.why, "used");
  assert.equal(toldOf(wire, "Alice", "opened_twice"), 1);
});

for (const [beforeUs, isThere] of [[1, true], [0, false]]) {
  test(`${beforeUs} µs before its end a link that was renewed is there: ${isThere}`, async () => {
    const { wire, alice } = await apart();
    await wire.do("Alice", alice.renew(wire.now));
    await wire.rounds(4);
    const now = { ...wire.now, wallUs: alice.record.expiresUs - beforeUs };
    await wire.do("Alice", alice.tick(now));
    const { invited, linkSigner, linkPrivateKey, state } = alice.record;
    assert.deepEqual(
      [invited !== null, linkSigner !== "", linkPrivateKey !== null, state],
      [isThere, isThere, isThere, "paired"]);
  });
}

for (const says of ["renew", "unshare"]) {
  test(`a thief who has welcomed somebody is undone by who has said ${says}`, async () => {
    const wire = new Wire();
    const [alice, saved] = await Contact.invite(SUITE, wire.now, "Bob", RELAYS);
    wire.contacts.Alice = alice;
    await wire.do("Alice", saved);
    const link = readLink(alice.record.invitation);
    // His copy is from when the link waited.
    const thief = copied(alice);
    if (says === "renew") {
      await openLink(wire, "Bob", link);
      await wire.rounds(8);
    }
    await wire.do("Alice", alice[says](wire.now));
    await wire.rounds(4);
    for (const { pub } of alice.mailboxes) wire.boxes.delete(pub);
    const eve = await openLink(wire, "Eve", link);
    wire.contacts.Thief = thief;
    await wire.poll("Thief");
    await wire.poll("Eve");
    assert.deepEqual([eve.record.state, eve.record.contact], ["ready", thief.record.signer]);
    await wire.poll("Alice");
    await wire.poll("Eve");
    assert.deepEqual([eve.record.state, eve.record.why], ["ended", "unshared"]);
    assert.equal(toldOf(wire, "Alice", "opened_twice"), says === "renew" ? 1 : 0);
  });
}

for (const when of ["before", "meanwhile", "afterwards"]) {
  test(`a hello with the address of the contact ends no contact: ${when}`, async () => {
    const { wire, alice, bob } = await apart();
    const link = readLink(alice.record.invitation);
    if (when !== "before") await wire.do("Alice", alice.renew(wire.now));
    if (when === "afterwards") await wire.rounds(4);
    for (const { pub } of bob.mailboxes) wire.boxes.delete(pub);
    const [key, from] = await SUITE.makeKey("ECDSA");
    const { address: connectoid } = bob.record.pending ?? bob.record.current;
    const jws = await signJws(SUITE, key, {
      type: "hello", to: link.address, from, seq: 1, re: null, connectoid,
      nonce: encodeBase64url(new Uint8Array(16)), sdpOffer: makeSdp("offer"),
    });
    const mailbox = alice.mailboxes.find(({ pub }) => link.address.startsWith(pub));
    const text = `${jws}.${await prove(link.secret, jws)}`;
    wire.deliver({ mailbox, data: await sealMessage(SUITE, mailbox.pub, text) });
    await wire.poll("Alice");
    assert.equal(alice.record.usedTo.length, 1);
    await wire.poll("Bob");
    assert.equal(bob.record.state, "paired");
    const dropped = Object.values(bob.dropped).reduce((sum, count) => sum + count, 0);
    assert.ok(dropped >= (when === "afterwards" ? 2 : 1));
  });
}

for (const name of ["Alice", "Bob"]) {
  test(`a copy of ${name}'s device that fills mailboxes shuts nobody out`, async () => {
    const { wire, owner, other, otherName } = sides(await apart(), name);
    const addresses = () => addressesOf(other.record).map(({ address }) => address).sort();
    const before = addresses();
    const thief = copied(owner);
    wire.contacts[name] = thief;
    // More than a relay keeps of one source, in each of four rounds, and each word is answered.
    for (let round = 0; round < 4; round += 1) {
      for (let number = 0; number < 64; number += 1) await put(wire, other, `${round} ${number}`);
      await wire.rounds(1);
      wire.nowS += 60;
      await wire.do(name, thief.connect(wire.now));
      await wire.rounds(4);
      await wire.do(name, thief.disconnect(wire.now));
      await wire.do(otherName, other.disconnect(wire.now));
    }
    assert.deepEqual(addresses(), before);
    wire.nowS += 60;
    await wire.do(name, owner.unshare(wire.now));
    await wire.poll(otherName);
    assert.deepEqual([other.record.state, other.record.why], ["ended", "unshared"]);
  });
}

test("a record with other news of a key is damaged, and one without opens", async () => {
  const { alice } = await apart();
  const { keyNews, ...before } = alice.record;
  assert.equal(keyNews, "");
  assert.deepEqual(checkRecord(before), alice.record);
  assert.throws(() => checkRecord({ ...alice.record, keyNews: "stolen" }), /damaged/);
});

for (const [afterS, times] of [[-1, 1], [0, 2], [1, 2]]) {
  test(`a new key ${afterS} s after an hour is told ${times} times in all`, async () => {
    const { wire, alice, bob } = await apart();
    const begunS = wire.nowS;
    for (const atS of [0, 600, TELL_EVERY_S + afterS]) {
      await wire.poll("Bob");
      wire.nowS = begunS + atS;
      await wire.do("Bob", bob.renew(wire.now));
      await wire.poll("Alice");
    }
    assert.equal(alice.record.contact, bob.record.signer);
    assert.equal(toldOf(wire, "Alice", "contact_renewed"), times);
  });
}

for (const step of [-1, 0, 1]) {
  test(`one who renews without end gets few replies: ${step} more`, async () => {
    const { wire, alice, bob } = await apart();
    wire.nowS += 60;
    const most = 1 + MAX_RENEWAL_ANSWERS;
    let sent = 0;
    for (let number = 0; number < most + step; number += 1) {
      // He waits for no answer.
      const { record } = wire.contacts.Bob;
      wire.contacts.Bob = new Contact(SUITE, checkRecord({
        ...record, oldPrivateKey: null, oldSigner: "", pending: null, replaced: [],
      }));
      await wire.do("Bob", wire.contacts.Bob.renew(wire.now));
      const { seq } = alice.record;
      await wire.poll("Alice");
      if (alice.record.seq !== seq) sent += 1;
      wire.nowS += 1;
    }
    assert.equal(sent, most + Math.min(step, 0));
    assert.equal(alice.record.contact, wire.contacts.Bob.record.signer);
    // What was left out is made up for.
    wire.nowS += AGAIN_IDLE_S;
    await wire.do("Bob", wire.contacts.Bob.tick(wire.now));
    await wire.rounds(4);
    assertAgreed(alice, wire.contacts.Bob);
    assert.notEqual(alice.record.contact, bob.record.signer);
  });
}
