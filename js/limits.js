// @ts-check
/**
 * The limits of the protocol, and those that are the library's own to choose within it.
 *
 * What a pause or a time-out counts (`_S`) is seconds of a monotonic clock. What outlives the
 * page (`_US`) is microseconds of the wall clock. PROTOCOL.md, "Limits".
 * @module
 */

// -- Forms -------------------------------------------------------------------------------

// Of JSON: arrays and objects in each other. No message has more than three.
export const MAX_JSON_LEVELS = 100;
// In an address. Each costs the other side a seal and a request for every message.
export const MAX_MAILBOXES = 3;
// Of a mailbox's `ext`, in code points, as relays count it.
export const MAX_EXT_CHARS = 1_024;
// Of a relay's URL.
export const MAX_URL_CHARS = 512;
// Of a host's name, and of each part between its dots (RFC 1035).
export const MAX_HOST_CHARS = 253;
export const MAX_LABEL_CHARS = 63;
// Of a contact's address. Beside two such addresses a message still holds an SDP, without some of
// its candidates.
export const MAX_ADDRESS_CHARS = 4_096;
// Bytes of a payload beside its two addresses and its SDP: names, hashes, keys, the longest app.
export const MAX_OTHER_BYTES = 768;
// The largest integer that a number holds exactly.
export const MAX_SEQ = 2 ** 53;
// Of an app's identifier: a long domain, or an origin.
export const MAX_APP_CHARS = 128;
// Of its hash in a link. Two apps of a million have the same with one chance in 500.
export const APP_HASH_BYTES = 6;
// In the list of a hello or welcome, and the largest of them: three digits. There is one so far.
export const MAX_VERSIONS = 16;
export const MAX_VERSION = 999;
// Of an SDP. The largest are less than half as long: 32 candidates, three fingerprints.
export const MAX_SDP_CHARS = 8_192;
// Its candidates and fingerprints, and twice as many as browsers add to them.
export const MAX_SDP_LINES = 128;
// A password of 256 characters and a SHA-512 in hex fit.
export const MAX_SDP_LINE_CHARS = 512;
// In an SDP. WebRTC sends about eight datagrams to each, wherever that is. Three networks with four
// candidates each for IPv4 and IPv6 have 24.
export const MAX_CANDIDATES = 32;
// In an SDP: SHA-256, SHA-384, SHA-512, and one more.
export const MAX_FINGERPRINTS = 4;
// TURN servers that a relay lends: one over UDP, TCP and TLS, and one to spare.
export const MAX_TURN_URLS = 4;
// Of a user name or a password for them. RFC 8489 allows names of 508 bytes.
export const MAX_TURN_CHARS = 256;
// For which they are used, whatever a relay says: a day.
export const MAX_TURN_TTL_S = 86_400;
// The `at` that no message has. The clocks of relays end in 2200.
export const NO_AT = MAX_SEQ - 1;
// Of S, R and a hello's nonce: 128 bits.
export const SECRET_BYTES = 16;
// Of what each side sends the other on a new channel.
export const CHALLENGE_BYTES = 32;
// The allowed sizes of a plaintext in bytes: all that a relay learns of its length.
export const SIZES = [1_024, 2_048, 4_096, 8_192, 16_384];
// Of a message of the app on a channel: what every WebRTC stack carries. A larger one would have to
// be gathered in memory before anybody could refuse it.
export const MAX_CHANNEL_BYTES = 65_536;
// Of the length before a text.
export const LENGTH_BYTES = 4;

// -- Polling -----------------------------------------------------------------------------

// Between two checks while something is going on, where the relay does not wait.
export const POLL_FAST_S = 2;
// Otherwise. PROTOCOL.md allows 66: this leaves time for replies, and for gathering an SDP.
export const POLL_SLOW_S = 55;
// After a message was sent or came.
export const POLL_FAST_FOR_S = 90;
// An offer is still good if the check before it was at most so long ago.
export const FRESH_S = 75;
// Between two checks from 0: they show what a relay that lost its clock would hide.
export const ZERO_EVERY_S = 3_600;

// -- Connecting --------------------------------------------------------------------------

// From an answer to the next attempt, without a connection.
export const AGAIN_AFTER_ANSWER_S = 20;
// From an offer to the next attempt. The other side polls at least every 66 s.
export const AGAIN_AFTER_OFFER_S = 50;
// From the start, or from the other side's last sign. Later, attempts are rare.
export const ACTIVE_S = 120;
// Between rare attempts: 50 minutes, less than a relay keeps a message.
export const AGAIN_IDLE_S = 3_000;
// Answered attempts in a row without a channel. More would only cost the relays something.
export const MAX_UNREACHABLE = 3;
// Between two attempts after these. Both are there, and one of them may soon be in another network.
// In an hour a mailbox gets less than the 32 messages that a relay keeps of one source.
export const AGAIN_UNREACHABLE_S = 600;
// A call that comes sooner after an offer has crossed it.
export const NEW_OFFER_S = 5;
// For WebRTC to gather. An adapter has its own limit of 2 s, after up to 4 s in which relays say
// which servers they have.
export const GATHERED_S = 10;

// Between two `moved` that nothing has answered. A relay keeps each for an hour: a contact whose
// app runs now and then may need several.
export const MOVED_EVERY_S = 86_400;

// -- Replies and memory ------------------------------------------------------------------

// Between two welcomes, two unshares, two replies to `moved`, or two useds to keys that were told
// before.
export const REPEAT_S = 60;
// Answers to `renew` beyond one in REPEAT_S, which take as long to come back. A user needs one, and
// one more where both renew at once. A contact renews as often as they like, and each answer goes
// to three mailboxes of their choice, at somebody else's relay.
export const MAX_RENEWAL_ANSWERS = 3;
// Between two events of a kind that others can bring about as often as they like: an app that shows
// each would be theirs to fill. All that they tell of counts all the same.
export const TELL_EVERY_S = 3_600;
// Keys that are told within REPEAT_S for the first time that a link is used. A stranger with many
// keys cannot make this page send without end, and sends as much to keep others from hearing.
export const MAX_NEWLY_TOLD = 10;
// Keys remembered that were told so, the newest: as many as one source can leave messages in a
// mailbox. A key that is told again takes no place from one that was not.
export const MAX_USED = 32;
// Digests of messages that were read, so that what comes again costs little: more than one round
// brings of a mailbox.
export const MAX_SEEN = 2_048;
// Messages that a mailbox may bring at once, and that each second takes off what it has brought.
// One that has brought more rests until nothing is left of it. An honest relay keeps 32 messages of
// one source in a mailbox, and a contact may write from two networks. A full mailbox of 256 rests
// for 64 s, so its offers are still fresh.
export const MAX_BURST_MESSAGES = 64;
export const BURST_PER_S = 4;
// Messages that a relay may bring at once for all contacts together, and that each second takes off
// what it has brought. Each costs a decryption, and so does a question: a second of CPU at once,
// and 3 % of it for ever. Above it those are read that have brought least, and others wait. An hour
// of absence brings ten messages for each of two hundred contacts.
export const MAX_RELAY_MESSAGES = 2_048;
export const RELAY_MESSAGES_PER_S = 64;

// -- What outlives the page --------------------------------------------------------------

export const DAY_US = 86_400_000_000;

// How long a link is valid. For as long, everybody else who opens it is told.
export const INVITATION_US = 30 * DAY_US;
// How long a former contact is told.
export const TOMBSTONE_US = 30 * DAY_US;
// By how much a `seq` may be ahead of one's own clock. Whoever has copied a device could otherwise
// number one message so high that nothing counts that its owner sends. Clocks that are set at all
// differ by less.
export const MAX_SEQ_AHEAD_US = DAY_US;
// The age at which an address is replaced.
export const ROTATION_US = 30 * DAY_US;
// Addresses that were announced and then replaced, and that the contact has not written to yet.
// Each is polled, as the contact may know no newer one: 24 of the 256 checks in a batch at most. A
// user who changes relays nine times in vain is better served by a new link.
export const MAX_REPLACED = 8;
// Former addresses with which a user may still change relays or renew. They are polled for 30 days,
// as the owner of a copied device may know no newer one. Nobody changes relays nine times a month.
export const MAX_FORMER = 8;
// Hashes kept of what has told the contact of a new signing key, the newest. In an hour a mailbox
// gets less than 32 messages of one source, and before each goes a `renew`. An answer to an older
// one is no loss: the next `moved` gets another.
export const MAX_RENEWAL_HASHES = 64;
// In the mailbox of a link that nobody has opened yet: a flood. One source cannot send half as
// many, and an opener sends few.
export const FLOODED_MESSAGES = 64;
export const NEVER_US = Infinity;
// 2026-11-23. A clock that shows less is wrong.
export const RELEASE_US = 1_795_392_000_000_000;
