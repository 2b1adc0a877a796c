// @ts-check
/**
 * The connection check: what this network lets through, told while it is found out.
 * @module
 */

import { icon, make, part } from "./ui.js";
import { wordsOfFinding } from "./words.js";

/** @import { Finding, Patient } from "../../js/connectoid.js" */

const ICONS = { ok: "check", warn: "warn", bad: "warn", ask: "check" };
// For those who do not see the colour.
const STATES = { ok: "Good:", warn: "Note:", bad: "Problem:", ask: "" };

// Ends the check that goes on.
let ending = new AbortController();

/**
 * Open the dialog, and check what is given until all is said, or the user ends it.
 * @param {Patient} given
 */
export async function openCheck(given) {
  part("check-dialog").addEventListener("close", end, { once: true });
  part("check-stop").onclick = end;
  part("check-again").onclick = () => check(given);
  part("check-dialog").showModal();
  await check(given);
}

/** @param {Patient} given */
async function check(given) {
  end();
  ending = new AbortController();
  const { signal } = ending;
  part("check-findings").replaceChildren();
  part("check-again").hidden = true;
  part("check-stop").hidden = false;
  try {
    const { examine } = await import("./lib.js");
    for await (const finding of examine(given, { signal })) show(finding);
    // Another one may go on by now.
    if (!signal.aborted) finish("That is all.");
  } catch (error) {
    console.error(error);
    finish("The check does not work here: reload this page, or use a newer browser.");
  }
}

function end() {
  if (ending.signal.aborted || part("check-stop").hidden) return;
  ending.abort();
  finish("Stopped.");
}

/** @param {string} words */
function finish(words) {
  const isFocused = document.activeElement === part("check-stop");
  part("check-now").textContent = words;
  part("check-stop").hidden = true;
  part("check-again").hidden = false;
  if (isFocused) part("check-again").focus();
}

/** @param {Finding} finding */
function show(finding) {
  const words = wordsOfFinding(finding);
  if (finding.state === "ask") {
    part("check-now").textContent = words;
    return;
  }
  const state = make("span", { className: "hidden" }, `${STATES[finding.state]} `);
  const line = make("li", { className: finding.state }, icon(ICONS[finding.state]));
  line.append(make("span", {}, state, words));
  part("check-findings").append(line);
}
