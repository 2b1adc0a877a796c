/** The vectors: vectors/library, and the questions of vectors/relay. */

import { test } from "node:test";

import { load } from "./harness.mjs";
import { checks } from "./vector_checks.mjs";

for (const [name, check] of await checks(load)) test(`vector ${name}`, check);
