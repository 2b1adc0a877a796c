/**
 * Make dist/ for a release: `npm run build`.
 *
 *     dist/connectoid.js       all modules in one file, readable
 *     dist/connectoid.min.js   the same without comments and spaces, as small as it gets
 *     dist/connectoid.d.ts     types for the first
 *
 * The script `types`, which runs first, has made dist/types.
 */

import { readFile, writeFile } from "node:fs/promises";
import { gzipSync } from "node:zlib";

import { build } from "esbuild";

const here = (name) => new URL(name, import.meta.url);
const { version, license } = JSON.parse(await readFile(here("package.json"), "utf8"));

const banner = `/*! Connectoid ${version}, ${license} License, (c) 2026 The Connectoid authors */`;
const common = {
  entryPoints: [here("connectoid.js").pathname],
  bundle: true,
  format: "esm",
  target: "es2022",
  // The emoji stay as they are.
  charset: "utf8",
  banner: { js: banner },
};

/** Say how large a file is. */
async function measure(name) {
  const octets = await readFile(here(name));
  const compressed = gzipSync(octets, { level: 9 });
  console.log(`${name}  ${octets.length} bytes, ${compressed.length} compressed`);
}

await build({ ...common, outfile: here("dist/connectoid.js").pathname });
await build({ ...common, outfile: here("dist/connectoid.min.js").pathname, minify: true });
await writeFile(here("dist/connectoid.d.ts"), 'export * from "./types/connectoid.js";\n');
await measure("dist/connectoid.js");
await measure("dist/connectoid.min.js");
