// @ts-check
/**
 * The form of the two tables of states.
 *
 * A rule says what a state does with an event and which states may follow. An event without a
 * rule is no event of that state: a message is refused, and a late word of WebRTC is ignored.
 * PAIRING stands at the end of pairing.js and CONNECTING at the end of connecting.js, each below
 * the functions that it holds. PROTOCOL.md, "States", is drawn from both.
 * @module
 */

/** @import { Machine } from "./machine.js" */

/**
 * @typedef {"inviter" | "opener"} Role
 * @typedef {"invited" | "opened" | "welcomed" | "ready" | "paired" | "unshared" | "ended"
 *   } PairingState
 * @typedef {"apart" | "gathering" | "waiting" | "joining" | "proving" | "connected"
 *   } ConnectingState
 *
 * Handles an event and returns the next state.
 * @typedef {(machine: Machine, ...args: any[]) => string | Promise<string>} Does
 *
 * In a state, an event: the function that handles it, and the states that may follow.
 * @typedef {{state: string, event: string, does: Does, then: string[]}} Rule
 *
 * @typedef {ReadonlyMap<string, Rule>} Table
 */

/**
 * What is known of the other. This survives the page.
 * @type {Readonly<Record<PairingState, string>>}
 */
export const PAIRING_STATES = {
  invited: "the inviter has made a link, and nobody has used it",
  welcomed: "a hello has come; the opener has not shown yet that it knows the inviter",
  opened: "the opener has a link, and no welcome yet",
  ready: "the opener has the welcome; the inviter has not shown yet that it knows so",
  paired: "each knows that the other knows",
  unshared: "the user has ended the sharing; the other is told",
  ended: "nothing is left but a name and a reason",
};

/**
 * What goes on to connect. This ends with the page.
 * @type {Readonly<Record<ConnectingState, string>>}
 */
export const CONNECTING_STATES = {
  apart: "nothing",
  gathering: "WebRTC looks for its candidates",
  waiting: "a hello, an offer or a call is out",
  joining: "both have offer and answer, and the channel is not open",
  proving: "the channel is open, and each end shows whose it is",
  connected: "the channel is the app's",
};

/** The opener in these states wants to connect, whether the app does or not. */
export const LASTING = ["opened", "ready"];

/** These states of CONNECTING last only so long. */
export const RESTLESS = ["gathering", "waiting", "joining", "proving"];

/** The numbered messages that each role takes from the other. @type {Record<Role, string[]>} */
export const NUMBERED_FOR = {
  inviter: ["ready", "offer", "moved", "renew", "unshare"],
  opener: ["answer", "call", "moved", "renew", "unshare"],
};

/**
 * Each is the last word of a signing key, whatever its `seq`. So a thief who has copied a device
 * cannot keep its owner from ending the contact, or from renewing the key.
 */
export const LAST_WORDS = ["unshare", "renew"];

/**
 * Return the rules by "state event".
 *
 * A row is: states, event, function, states that may follow. There `=` is the state itself.
 * @param {...[states: string, event: string, does: Does, then: string]} rows
 * @returns {Table}
 */
export function makeTable(...rows) {
  const rules = new Map();
  for (const [states, event, does, all] of rows) {
    for (const state of states.split(" ")) {
      const then = [...new Set(all.replace("=", state).split(" "))];
      rules.set(`${state} ${event}`, { state, event, does, then });
    }
  }
  return rules;
}
