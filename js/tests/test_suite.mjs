/** The suite: what the vectors cannot say of it. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { SystemSuite, decodeBase64url, decompress } from "../connectoid.js";
import { SUITE, load } from "./harness.mjs";
import { importKey } from "./vector_checks.mjs";

const COMPRESSED_BYTES = 49;

/** A Web Crypto that takes no compressed points of ECDH. */
const oldSubtle = new Proxy(crypto.subtle, {
  get(target, name) {
    if (name !== "importKey") return target[name].bind(target);
    return async (format, octets, algorithm, ...rest) => {
      const isCompressed = format === "raw" && octets.length === COMPRESSED_BYTES;
      if (isCompressed && algorithm.name === "ECDH") throw new Error("not here");
      return target.importKey(format, octets, algorithm, ...rest);
    };
  },
});

test("points are decompressed", async () => {
  const { cases } = await load("library/keys");
  for (const { pub, private: scalar } of cases.filter((each) => each.private)) {
    const { publicKey } = await importKey(scalar);
    const raw = new Uint8Array(await crypto.subtle.exportKey("raw", publicKey));
    assert.deepEqual(decompress(decodeBase64url(pub)), raw);
  }
  for (const { pub } of cases.filter((each) => each.refused)) {
    if (!/^A[g-z0-9_-].{64}$/.test(pub)) continue;
    assert.throws(() => decompress(decodeBase64url(pub)), `${pub}`);
  }
});

test("an engine without compressed points seals and refuses alike", async () => {
  const getRandomValues = (octets) => crypto.getRandomValues(octets);
  const old = new SystemSuite({ subtle: oldSubtle, getRandomValues });
  const [key, pub] = await SUITE.makeKey("ECDH");
  const context = Uint8Array.of(1);
  const sealed = await old.seal(pub, context, Uint8Array.of(2));
  assert.deepEqual(await SUITE.open(key, context, sealed), Uint8Array.of(2));
  const { cases } = await load("library/keys");
  for (const { pub: bad, refused } of cases.filter((each) => each.refused)) {
    await assert.rejects(old.check(bad), { reason: refused });
  }
});

test("private keys cannot be taken out", async () => {
  for (const use of ["ECDH", "ECDSA"]) {
    const [{ privateKey }] = await SUITE.makeKey(use);
    await assert.rejects(crypto.subtle.exportKey("jwk", privateKey));
    await assert.rejects(crypto.subtle.exportKey("pkcs8", privateKey));
  }
});

test("a page without Web Crypto is told what to do", () => {
  assert.throws(() => new SystemSuite({}), /over https/);
});
