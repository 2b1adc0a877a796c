// @ts-check
/**
 * What goes into a step of the machine, what a step asks for, and what the app is told.
 * @module
 */

import { MAX_SEQ, RELEASE_US } from "../limits.js";

/** @import { Bytes } from "../encoding.js" */
/** @import { Mailbox } from "../links.js" */
/** @import { Sdp } from "../messages.js" */
/** @import { Key } from "../suite.js" */
/** @import { ContactRecord } from "./record.js" */

/**
 * The time, twice: of the wall, in microseconds since 1970, and one that never goes back, in
 * seconds.
 * @typedef {{wallUs: number, monotonicS: number}} Now
 *
 * Write the record down, durably, before any other effect. If that fails, drop the Contact.
 * @typedef {{do: "save", record: ContactRecord}} Save
 *
 * Delete the record.
 * @typedef {{do: "forget"}} Forget
 *
 * Send data to a mailbox. Once a relay has taken it, `Contact.sent` gets the hash of its message.
 * `isToStranger`: not to the contact, but to somebody who has opened the link too.
 * @typedef {{do: "send", mailbox: Mailbox, data: string, isToStranger: boolean, hash: string}} Send
 *
 * Make a peer connection in place of the former one, and an offer, or the answer to this offer.
 * `Contact.gathered` takes what comes of it.
 * @typedef {{do: "gather", attemptId: number, offer: Sdp | null}} Gather
 *
 * Give the answer to the peer connection.
 * @typedef {{do: "join", attemptId: number, answer: Sdp}} Join
 *
 * Send one binary message on the data channel.
 * @typedef {{do: "write", attemptId: number, octets: Bytes}} Write
 *
 * Close the peer connection, if there is one.
 * @typedef {{do: "close", attemptId: number}} Close
 *
 * Tell the app a key of EVENTS.
 * @typedef {{do: "tell", event: string}} Tell
 *
 * @typedef {Save | Forget | Send | Gather | Join | Write | Close | Tell} Effect
 *
 * A mailbox to check: `at` goes into the check, the key opens its question and its messages.
 * @typedef {{mailbox: Mailbox, key: Key, at: number}} Poll
 */

/**
 * Say whether the wall clock shows a time that can be true.
 * @param {Now} now
 */
export function isSet({ wallUs }) {
  return RELEASE_US <= wallUs && wallUs < MAX_SEQ / 2;
}

/**
 * What an app wants of all connections; contacts learn nothing of it.
 *
 * `relayOnly`: contacts are told no address but those of TURN servers. `askFirst`: a contact who
 * wants to connect is told no address at all before the app wants to connect too, and nothing goes
 * to a relay that is newly named.
 * @typedef {{relayOnly?: boolean, askFirst?: boolean}} Privacy
 */

/** Anybody with the link brings the first three about, and the contact the last one. */
export const REPEATABLE = ["opened_twice", "flooded", "needs_newer_app", "contact_renewed"];

/** @type {Readonly<Record<string, string>>} */
export const EVENTS = {
  paired: "Both know each other now. The emoji can be compared.",
  connected: "The channel is open, and the other end has shown whose it is.",
  wants_to_connect: "The contact would like to connect, and waits until this side does too.",
  disconnected: "The channel is closed.",
  opened_twice: "Somebody else opened this link too. "
    + "Compare the emoji by voice before you trust this contact.",
  flooded: "Somebody fills the mailbox of this link. "
    + "If nobody opens it soon, share again with a new link.",
  needs_newer_app:
    "Somebody with this link has a newer app. If the two of you do not connect, update this one.",
  refused: "Something that came for this contact was refused and changed nothing: "
    + "`refusals` says why.",
  renewed: "The contact knows the new key of this side, "
    + "and takes nothing any more from copies of this device from before.",
  contact_renewed: "The contact has a new key, and its former one counts no more. "
    + "If it has not asked for that, somebody has a copy of its device: unshare, and share again.",
  copied: "Two devices say that they are this contact: somebody has a copy of its device. "
    + "End the contact, and share again.",
  used: "This link was used by somebody else, or withdrawn; ask for a new one.",
  expired: "Nobody answered for as long as the link was good; share again.",
  unshared: "The other has ended the sharing.",
  unsent: "No relay takes what this side sends to the contact. "
    + "Another attempt is made from time to time.",
  unanswered: "No answer yet. Another attempt is made from time to time.",
  unreachable:
    "Both answered, but their networks do not connect: they may need a TURN server.",
};
