"""Limits: those that PROTOCOL.md fixes, and our choice within them.

Seconds are of a monotonic clock. Times that outlive the process are in microseconds of the wall
clock.
"""

from __future__ import annotations

# -- Fixed by PROTOCOL.md ----------------------------------------------------------------

# Levels of JSON: arrays and objects in each other. No message has more than three.
MAX_JSON_LEVELS = 100

# Mailboxes in an address. Each costs the other a seal and a request for every message.
MAX_MAILBOXES = 3

# Code points of a mailbox's `ext`, as relays count them.
MAX_EXT_CHARS = 1_024

# Characters of a relay's URL.
MAX_URL_CHARS = 512

# Characters of a host's name, and of each part between its dots (RFC 1035).
MAX_HOST_CHARS = 253
MAX_LABEL_CHARS = 63

# Characters of a contact's address. Beside two such addresses a message still holds an SDP, without
# some of its candidates.
MAX_ADDRESS_CHARS = 4_096

# Bytes of a payload beside its two addresses and its SDP: names, hashes, keys, the longest app.
MAX_OTHER_BYTES = 768

# The bound of `seq`. JavaScript's numbers are exact below it.
MAX_SEQ = 2**53

# Characters of an app's identifier: a long domain, or an origin.
MAX_APP_CHARS = 128

# Bytes of its hash in a link. Two apps of a million have the same with one chance in 500.
APP_HASH_BYTES = 6

# Versions that a hello or welcome names, and the largest number of one: three digits. There is one
# so far.
MAX_VERSIONS = 16
MAX_VERSION = 999

# Characters of an SDP. The largest are less than half as long: 32 candidates, three fingerprints.
MAX_SDP_CHARS = 8_192

# Lines of an SDP. Its candidates and fingerprints, and twice as many as browsers add to them.
MAX_SDP_LINES = 128

# Characters of a line of an SDP. A password of 256 characters and a SHA-512 in hex fit.
MAX_SDP_LINE_CHARS = 512

# Candidates in an SDP. WebRTC sends about eight datagrams to each, wherever that is. Three networks
# with four candidates each for IPv4 and IPv6 have 24.
MAX_CANDIDATES = 32

# Fingerprints in an SDP: SHA-256, SHA-384, SHA-512, and one more.
MAX_FINGERPRINTS = 4

# TURN servers that a relay lends: one over UDP, TCP and TLS, and one to spare.
MAX_TURN_URLS = 4

# Characters of a user name or a password for them. RFC 8489 allows names of 508 bytes.
MAX_TURN_CHARS = 256

# Seconds for which they are used, whatever a relay says: a day.
MAX_TURN_TTL_S = 86_400

# The `at` that no message has. The clocks of relays end in 2200.
NO_AT = MAX_SEQ - 1

# Bytes of S, of R and of a hello's nonce: 128 bits.
SECRET_BYTES = 16

# Bytes of the challenge that each side sends on a new channel.
CHALLENGE_BYTES = 32

# The possible sizes of a plaintext. A relay learns no more of the length of a message.
SIZES = (1_024, 2_048, 4_096, 8_192, 16_384)

# Bytes of a message of the app on a channel: what every WebRTC stack carries. A larger one would
# have to be gathered in memory before anybody could refuse it.
MAX_CHANNEL_BYTES = 65_536

# Bytes of the length in front of a plaintext.
LENGTH_BYTES = 4

# -- The rhythm of polling and connecting ------------------------------------------------

# Between two checks at a busy time, if the relay does not hold them.
POLL_FAST_S = 2.0

# Between two checks at a quiet time. PROTOCOL.md allows 66, which leaves time for the reply.
POLL_SLOW_S = 55.0

# The length of the busy time after a message was sent or received.
POLL_FAST_FOR_S = 90.0

# An offer is fresh if its mailbox was read to the end at most so long ago.
FRESH_S = 75.0

# Between two checks from 0. They find messages that a relay with a lost clock would hide.
ZERO_EVERY_S = 3_600.0

# From an answer to the next attempt.
AGAIN_AFTER_ANSWER_S = 20.0

# From an offer or a call to the next attempt. The other polls at least every 66 s.
AGAIN_AFTER_OFFER_S = 50.0

# Attempts are frequent for so long after the start or the other's last message.
ACTIVE_S = 120.0

# Between two attempts later: less than the hour for which a relay keeps a message.
AGAIN_IDLE_S = 3_000.0

# A call within this time after an offer has crossed it.
NEW_OFFER_S = 5.0

# The time for WebRTC to gather. The runner's own limit is 2 s, after up to 4 s in which relays say
# which servers they have.
GATHERED_S = 10.0

# Attempts in a row without a channel. More would only burden the relays.
MAX_UNREACHABLE = 3

# Between two attempts after these. Both are there, and one of them may soon be in another network.
# In an hour a mailbox gets less than the 32 messages that a relay keeps of one source.
AGAIN_UNREACHABLE_S = 600.0

# Between two `moved` that nothing has answered. A relay keeps each for an hour: a contact whose app
# runs now and then may need several.
MOVED_EVERY_S = 86_400.0

# -- Bounds on replies and memory --------------------------------------------------------

# Between two welcomes, two unshares, two replies to `moved`, or two useds to keys that were told
# before.
REPEAT_S = 60.0

# Answers to `renew` beyond one in REPEAT_S, which take as long to come back. A user needs one, and
# one more where both renew at once. A contact renews as often as they like, and each answer goes to
# three mailboxes of their choice, at somebody else's relay.
MAX_RENEWAL_ANSWERS = 3

# Between two events of a kind that others can bring about as often as they like: an app that shows
# each would be theirs to fill. All that they tell of counts all the same.
TELL_EVERY_S = 3_600.0

# Keys that are told within REPEAT_S for the first time that a link is used. A stranger with many
# keys cannot make this device send without end, and sends as much to keep others from hearing.
MAX_NEWLY_TOLD = 10

# Keys remembered that were told so, the newest: as many as one source can leave messages in a
# mailbox. A key that is told again takes no place from one that was not.
MAX_USED = 32

# Digests of messages that were read, so that what comes again costs little: more than one round
# brings of a mailbox.
MAX_SEEN = 2_048

# Messages that a mailbox may bring at once, and that each second takes off what it has brought. One
# that has brought more rests until nothing is left of it. An honest relay keeps 32 messages of one
# source in a mailbox, and a contact may write from two networks. A full mailbox of 256 rests for
# 64 s, so its offers are still fresh. To open four messages takes 2 ms.
MAX_BURST_MESSAGES = 64
BURST_PER_S = 4.0

# Messages that a relay may bring at once for all contacts together, and that each second takes off
# what it has brought. Each costs a decryption, and so does a question: a second of CPU at once, and
# 3 % of it for ever. Above it those are read that have brought least, and others wait. An hour of
# absence brings ten messages for each of two hundred contacts.
MAX_RELAY_MESSAGES = 2_048
RELAY_MESSAGES_PER_S = 64.0

# Addresses that were announced and then replaced, and that the contact has not written to yet. Each
# is polled, as the contact may know no newer one: 24 of the 256 checks in a batch at most. A user
# who changes relays nine times in vain is better served by a new link.
MAX_REPLACED = 8

# Former addresses with which a user may still change relays or renew. They are polled for 30 days,
# as the owner of a copied device may know no newer one. Nobody changes relays nine times a month.
MAX_FORMER = 8

# Messages in the mailbox of a link that nobody has opened yet: a flood. One source cannot send half
# as many, and an opener sends few.
FLOODED_MESSAGES = 64

# Hashes kept of what has told the contact of a new signing key, the newest. In an hour a mailbox
# gets less than 32 messages of one source, and before each goes a `renew`. An answer to an older
# one is no loss: the next `moved` gets another.
MAX_RENEWAL_HASHES = 64

# -- Times that outlive the process ------------------------------------------------------

DAY_US = 86_400_000_000

# The life of a link. So long the inviter also answers further hellos with `used`.
INVITATION_US = 30 * DAY_US

# The life of a tombstone.
TOMBSTONE_US = 30 * DAY_US

# The most by which a `seq` may be ahead of the recipient's clock. Whoever has copied a device could
# otherwise number one message so high that nothing counts that its owner sends. Clocks that are set
# at all differ by less.
MAX_SEQ_AHEAD_US = DAY_US

# The age at which an address is replaced.
ROTATION_US = 30 * DAY_US

NEVER_US = 2**63 - 1

# 2026-11-23. A clock that shows less is wrong.
RELEASE_US = 1_795_392_000_000_000
