// @ts-check
/**
 * Every error of the library.
 *
 * The app's mistakes are a UsageError, the user's a LinkError. A damaged record, the store, a
 * relay and a connection have one each. Refused is what others sent: it is counted and forgotten.
 * @module
 */

/**
 * The reasons for which a message is refused. PROTOCOL.md, "Reading a message".
 * @type {Readonly<Record<string, string>>}
 */
export const REASONS = {
  encoding: "not canonical base64url without padding",
  seal: "not sealed to this mailbox with this context string",
  padding: "the plaintext has no allowed size, a wrong length, or something in its padding",
  jws: "not three parts with the one header (a hello has a fourth)",
  payload: "not JSON with the members and forms of its type",
  sdp: "an offer or answer that is not that of one data channel, within bounds",
  unexpected: "a type that has no place in this state or from this side",
  recipient: "`to` is not the address that this mailbox belongs to",
  proof: "a hello without the secret of the link, or a new key that has not signed for itself",
  commitment: "a signing key and `r` that do not match the link",
  reply: "`re` is not the hash of what was sent",
  sender: "`from` is not the contact's signing key",
  replaced: "signed by a key that the contact has replaced: it came late, or from a copy",
  replay: "a `seq` that is not larger than the last one, or the very bytes again",
  ahead: "a `seq` that is a day ahead of this device's clock: one of the two clocks is wrong",
  signature: "not signed by `from`",
  copied: "a new key of the contact beside another one: somebody has a copy of its device",
  address: "an address that nobody should write to",
  app: "of another app, or for another one",
  version: "no version of the protocol that both sides speak",
  channel: "the other end of the channel could not show whose it is",
};

/**
 * The reasons for which nothing is wrong: copies of a message wait in each mailbox and are read
 * again each hour, and what the contact's former key has signed may come late.
 */
export const ROUTINE = ["replay", "replaced"];

/** The parent of every error that this library throws. */
export class ConnectoidError extends Error {
  /** @param {string} text */
  constructor(text) {
    super(text);
    this.name = new.target.name;
  }
}

/** The app asked for something that makes no sense now, or that fits in no message. */
export class UsageError extends ConnectoidError {}

/** A link that cannot be used. Its text tells the user what to do. */
export class LinkError extends ConnectoidError {}

/** A link of another app: the user opens it there. */
export class OtherAppError extends LinkError {}

/** A link of a later version of the protocol: the user needs a newer app. */
export class UnsupportedVersionError extends LinkError {}

/** A saved record that is damaged, or of another version. */
export class RecordError extends ConnectoidError {}

/** The store cannot be used. Its text says why, and what to do. */
export class StoreError extends ConnectoidError {}

/** There is no connection, or no longer. Its text says what is known of the reason. */
export class NotConnectedError extends ConnectoidError {}

/** A relay that cannot be reached, or answers rubbish. `retryS` is the pause it asked for, or 0. */
export class RelayError extends ConnectoidError {
  /**
   * @param {string} text
   * @param {number} [retryS]
   */
  constructor(text, retryS = 0) {
    super(text);
    this.retryS = retryS;
  }
}

/** There was no whole reply of a relay, or of anything in its place. */
export class UnreachableError extends RelayError {}

/** A relay has answered, and refuses one request. */
export class RelayRefusalError extends RelayError {}

/** Something from outside failed a check. `reason` is a key of REASONS. */
export class Refused extends ConnectoidError {
  /** @param {string} reason @param {string} [detail] */
  constructor(reason, detail = REASONS[reason]) {
    super(detail);
    this.reason = reason;
  }
}
