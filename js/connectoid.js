// @ts-check
/**
 * Connect two copies of a peer-to-peer app through nothing but a link.
 *
 * One user's app makes an invitation, which travels as a link through any messenger; the other's
 * opens it. From then on the two find each other through relays that can read nothing, and connect
 * directly. PROTOCOL.md says what goes over the wire. For browsers (a page over https) and
 * Node >= 20:
 *
 *     import { Connectoid, Store } from "./js/connectoid.js";
 *
 *     const relays = ["https://relay.example.com/"];
 *     const app = new Connectoid(await Store.open(), relays, { onEvent: console.log });
 *     await app.start();
 *     const link = await app.share("Bob", location.href);
 *     // On the other side: await app.open(link, "Alice");
 *     const channel = await app.connect("Bob");
 *     await channel.send("hello");
 *     for await (const message of channel) console.log(message);
 *
 * Every module is loaded as it is, without a build; knowledge flows from the first to the last:
 *
 *     limits errors encoding shown urls versions apps links suite sdp messages comparison
 *                                                             what is said, and how
 *     contact/   the machine of one contact: events and the time in, effects out; no I/O
 *     ice store relay_client webrtc system page                the world
 *     channel roster sender line carrier steps reports runner  Connectoid: moves the effects
 *     probes doctor                                            examine: what a network lets through
 * @module
 */

export const VERSION = "0.2.0";

export { Channel } from "./channel.js";
export { EMOJI, comparisonString } from "./comparison.js";
export { CONNECTING } from "./contact/connecting.js";
export { Contact } from "./contact/contact.js";
export { EVENTS } from "./contact/effects.js";
export { PAIRING } from "./contact/pairing.js";
export { checkRecord } from "./contact/record.js";
export { FINDINGS, examine } from "./doctor.js";
export { decodeBase64url, encodeBase64url } from "./encoding.js";
export {
  ConnectoidError, LinkError, NotConnectedError, OtherAppError, REASONS, ROUTINE, RecordError,
  Refused, RelayError, StoreError, UnsupportedVersionError, UsageError,
} from "./errors.js";
export { checkIceServers, hasStun, iceServers } from "./ice.js";
export { formatAddress, makeLink, parseAddress, parseInvitation, readLink } from "./links.js";
export { checkSignature, openMessage, readJws, sealMessage, signJws } from "./messages.js";
export { checkSdp } from "./sdp.js";
export { RelayClient } from "./relay_client.js";
export { Connectoid } from "./runner.js";
export { shown } from "./shown.js";
export { Store } from "./store.js";
export {
  CONTEXTS, SystemSuite, appOfContact, decompress, hashCommitment, hashJws, prove,
} from "./suite.js";
export { PeerAdapter } from "./webrtc.js";

/**
 * The types that an app meets.
 * @typedef {import("./encoding.js").Bytes} Bytes
 * @typedef {import("./links.js").Allowed} Allowed
 * @typedef {import("./links.js").Invitation} Invitation
 * @typedef {import("./links.js").Mailbox} Mailbox
 * @typedef {import("./links.js").Relay} Relay
 * @typedef {import("./suite.js").Key} Key
 * @typedef {import("./suite.js").Suite} Suite
 * @typedef {import("./messages.js").Message} Message
 * @typedef {import("./messages.js").Sdp} Sdp
 * @typedef {import("./contact/effects.js").Effect} Effect
 * @typedef {import("./contact/effects.js").Now} Now
 * @typedef {import("./doctor.js").Finding} Finding
 * @typedef {import("./doctor.js").Patient} Patient
 * @typedef {import("./contact/effects.js").Poll} Poll
 * @typedef {import("./contact/effects.js").Privacy} Privacy
 * @typedef {import("./contact/machine.js").Attempt} Attempt
 * @typedef {import("./contact/record.js").ContactRecord} ContactRecord
 * @typedef {import("./contact/record.js").OwnAddress} OwnAddress
 * @typedef {import("./contact/rules.js").Rule} Rule
 * @typedef {import("./runner.js").Options} Options
 * @typedef {import("./system.js").System} System
 * @typedef {import("./webrtc.js").Report} Report
 * @typedef {import("./webrtc.js").WebRTC} WebRTC
 */
