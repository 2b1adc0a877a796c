/** URLs of relays: what is taken, the parser of `fetch` reads in the same way. */

import assert from "node:assert/strict";
import { test } from "node:test";

import { originOf } from "../urls.js";

const HOSTS = ["relay.example.com", "A-1.b", "192.0.2.1", "[2001:db8::1]", "[64:ff9b::192.0.2.1]"];
const PORTS = ["", ":1", ":443", ":8443", ":65535"];
const PATHS = ["", "/", "//", "/a//b", "/%41%2F", "/...", "/._~!$&'()*+,;=:@-"];

test("what is taken is read by the parser of fetch as it is written", () => {
  for (const host of HOSTS) {
    for (const port of PORTS) {
      for (const path of PATHS) {
        const url = `https://${host}${port}${path}`;
        const read = new URL(url);
        const origin = originOf(url);
        assert.deepEqual([origin.scheme, origin.port], ["https", read.port || "443"], url);
        assert.equal(new URL(`https://${origin.host}`).hostname, read.hostname);
        assert.equal(read.pathname, path || "/");
      }
    }
  }
});
