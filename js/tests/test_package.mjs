/** The package: types, what npm packs, and the built files. */

import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { cp, mkdir, mkdtemp, rm, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { basename, dirname, join } from "node:path";
import { before, test } from "node:test";

import * as modules from "../connectoid.js";
import { closing, here, load } from "./harness.mjs";

const TSC = here("js/node_modules/typescript/bin/tsc");
const ESBUILD = here("js/node_modules/esbuild");
// Where Node brings it.
const NPM = join(dirname(process.execPath), "../lib/node_modules/npm/bin/npm-cli.js");

/** Return why a test is skipped, or false if it has all that it needs. */
function lacking(...paths) {
  const missing = paths.find((path) => !existsSync(path));
  if (!missing) return false;
  return `${basename(missing)} is missing: npm install --ignore-scripts in js/`;
}

/** Run a script of Node in a folder; return its exit status and its output. */
async function run(cwd, ...args) {
  const child = spawn(process.execPath, args, { cwd });
  let text = "";
  for (const stream of [child.stdout, child.stderr]) {
    stream.on("data", (part) => {
      text += part;
    });
  }
  const [status] = await once(child, "close");
  return { status, text };
}

const QUIET = { status: 0, text: "" };

// The example is checked as a bundler resolves it, for its folder has no package.json.
const EXAMPLE = [
  "--ignoreConfig", "--noEmit", "--checkJs", "--strict", "--allowJs", "--target", "es2022",
  "--lib", "es2024,dom,dom.iterable,dom.asynciterable", "--module", "esnext",
  "--moduleResolution", "bundler", "examples/shopping_list/app.js",
];

test("the types are strict", { skip: lacking(TSC) }, async () => {
  assert.deepEqual(await run(here("js"), TSC, "--noEmit", "--checkJs", "--strict"), QUIET);
  assert.deepEqual(await run(here("."), TSC, ...EXAMPLE), QUIET);
});

// -- A copy of the folder, packed and built ----------------------------------------------

const skip = lacking(TSC, NPM, ESBUILD);
let made = "";

before(async () => {
  if (skip) return;
  const folder = await mkdtemp(join(tmpdir(), "connectoid-package-"));
  closing.push(() => rm(folder, { recursive: true }));
  made = join(folder, "js");
  const isOurs = (path) => !/\/(node_modules|dist|tests)$/.test(path);
  await cp(here("js"), made, { recursive: true, filter: isOurs });
  await symlink(here("js/node_modules"), join(made, "node_modules"));
  for (const name of ["PROTOCOL.md", "LICENSE"]) await cp(here(name), join(folder, name));
});

const CONSUMER = `import { Channel, Connectoid, ConnectoidError, Store } from "connectoid";
const onProblem = (error: Error) => error.message;
const app = new Connectoid(await Store.open(), ["https://relay.example.com/"], { onProblem });
const name = await app.open("https://app.example.com/#connectoid=x", "Alice");
const channel: Channel = await app.connect(name);
for await (const message of channel) {
  if (typeof message !== "string") message.byteLength satisfies number;
}
const { verified }: { name: string, verified: boolean } = app.contacts()[0];
`;
const MISTAKES = {
  "a relay that is a number": "new Connectoid(await Store.open(), [8080]);",
  "a link without a name": 'await app.open("https://app.example.com/");',
  "a message that is a number": "await channel.send(1);",
  "an error that is none of the library": "const error: ConnectoidError = new Date();",
};
const MISTAKEN_LINE = CONSUMER.split("\n").length;

/** Install what npm packs for a program, and return the program's folder. */
async function installPacked() {
  const packed = await run(made, NPM, "pack", "--silent", "--offline");
  assert.equal(packed.status, 0, packed.text);
  const archive = join(made, packed.text.trim().split("\n").at(-1));
  const program = join(made, "../program");
  const place = join(program, "node_modules/connectoid");
  await mkdir(place, { recursive: true });
  const tar = spawn("tar", ["-xzf", archive, "--strip-components=1", "-C", place]);
  await once(tar, "close");
  return program;
}

test("a TypeScript program has the types of the package", { skip }, async () => {
  const program = await installPacked();
  const check = async (lines) => {
    await writeFile(join(program, "program.mts"), lines);
    const like = ["--strict", "--module", "nodenext", "--target", "es2022"];
    return run(program, TSC, "--noEmit", ...like, "program.mts");
  };
  assert.deepEqual(await check(CONSUMER), QUIET);
  for (const [mistake, line] of Object.entries(MISTAKES)) {
    const { status, text } = await check(CONSUMER + line);
    assert.notEqual(status, 0, mistake);
    assert.equal(text.match(/error TS/g)?.length, 1, `${mistake}: ${text}`);
    assert.ok(text.startsWith(`program.mts(${MISTAKEN_LINE},`), `${mistake}: ${text}`);
  }
  // The package works in Node without a build, and has its protocol and its license with it.
  const names = ["connectoid.js", "PROTOCOL.md", "LICENSE", "dist/types/connectoid.d.ts"];
  for (const name of names) {
    assert.ok(existsSync(join(program, "node_modules/connectoid", name)), name);
  }
  const script = 'console.log(typeof (await import("connectoid")).Connectoid)';
  const imported = await run(program, "--input-type=module", "-e", script);
  assert.deepEqual(imported, { status: 0, text: "function\n" });
});

test("the built files have the same names, and seal alike", { skip }, async () => {
  const built = await run(made, "build.mjs");
  assert.equal(built.status, 0, built.text);
  const { cases } = await load("library/keys");
  const [{ pub }] = cases.filter((each) => each.private);
  for (const file of ["connectoid.js", "connectoid.min.js"]) {
    const library = await import(join(made, "dist", file));
    assert.deepEqual(Object.keys(library).sort(), Object.keys(modules).sort());
    const suite = new library.SystemSuite();
    const [key, own] = await suite.makeKey("ECDH");
    const text = await library.sealMessage(suite, own, "milk, bread");
    assert.equal(await library.openMessage(suite, key, text), "milk, bread");
    await suite.check(pub);
  }
});
