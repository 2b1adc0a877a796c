/*
 * Renewal of signing keys, when both sides renew at once: PROTOCOL.md, "Renewal".
 *
 * Two paired sides. A side numbers its keys in the order in which it makes them. With each key it
 * makes an address, which has the same number here: other rotations are in rotation.pml. A side
 * renews when its newest key is not confirmed.
 *
 * There are two kinds of messages. `renew` is signed by key - 1 and by the next key, which it has.
 * All else is signed by the newest key. Each is for the newest address of the other
 * side that its sender knows. The network is as bad as can be: each message that was ever sent may
 * arrive at any time, or never, in any order, and again. Numbers of
 * messages are left out, so this network can do even more.
 *
 * From some time on relays work: what is sent arrives, `renew` first, though old messages may
 * still come in between.
 *
 * `understood`: each side knows the newest key of the other, or the one that vouches for it.
 * `agree`: once relays work, each comes to know the other's newest key, and no renewal is open.
 *
 * With THIEF somebody copies the device of side 0 at any time. He signs with the keys that it has
 * then, and what he says reaches side 1 at once. He may renew with a key of his own, also in the
 * round of the owner's renewal (RENEW-11), and have side 1 write to the owner's newest address,
 * which a relay tells him. Side 1 is `taken` when it knows the thief's key, and `copied` when it
 * has heard of two.
 *
 * `shut`: once side 1 knows a key that was made after the copy, it never knows the thief's.
 * `told`: a renewal of such a key that is complete has reached side 1.
 * `shows`: once relays work, both agree, or somebody is told of a key that nobody meant, or of two.
 * `untaken`: side 1 never knows the thief's key. That is not promised: the first one wins.
 *
 * With BY_ADDRESS anything that comes to the newest address completes a renewal, which RENEW-7
 * forbids. With OLD_KEY_COUNTS a key that was renewed still counts, which RENEW-8 forbids. With
 * PROVES_FOR_CONTACT a proof has the contact's key, too, and counts for the newest one alone,
 * which RENEW-4 leaves out. With ANYWHERE a renewal is complete with a message to any address,
 * which RENEW-7 forbids.
 */

/* Side has an arm for each key. */
#define KEYS 3

#define other (1 - me)
#define SENT(side, key, to) ((side) * (KEYS + 1) * (KEYS + 1) + (key) * (KEYS + 1) + (to))
#define renews(side) (newest[side] != confirmed[side])
/* The newest address, the current one, and the former one. */
#define POLLS(side, address) (address + 1 >= confirmed[side])

#ifdef PROVES_FOR_CONTACT
#define PROVES(side, key) (key == newest[side])
#else
#define PROVES(side, key) true
#endif

byte newest[2] = 1;
byte confirmed[2] = 1;
/* The key of the other side, with its address. */
byte knows[2] = 1;
/* By the key that is announced, or that signs; and by what is known of the other side. */
bool renewals[2 * (KEYS + 1) * (KEYS + 1)];
bool messages[2 * (KEYS + 1) * (KEYS + 1)];
bool works;

/* The newest key of side 0 when its device was copied, and what came of it at side 1. */
byte stolen;
bool taken;
bool copied;
/* The thief's words count at side 1, and those of the owner. */
#ifdef OLD_KEY_COUNTS
#define THIEF_COUNTS (stolen && !taken)
#else
#define THIEF_COUNTS (stolen && !taken && knows[1] <= stolen)
#endif
#define OWNER_COUNTS(side) (side == 0 || !taken)

/* Something that counts comes to an address: RENEW-7. */
#ifdef ANYWHERE
#define COMPLETES(side, address) (renews(side))
#else
#define COMPLETES(side, address) (renews(side) && address == newest[side])
#endif

inline complete(side, address) {
    if
    :: COMPLETES(side, address) -> confirmed[side] = newest[side]
    :: else
    fi
}

/* READ-22, READ-35, READ-36. */
#define ACCEPTS(side, key, address) \
    (OWNER_COUNTS(side) && (side == 0 || !copied) && POLLS(side, address) \
        && knows[side] + 1 == key && PROVES(side, address))
/* RENEW-8. */
inline take_renewal(side, key, address) {
    complete(side, address);
    knows[side] = key
}

/* Any other numbered message. */
#define COUNTS(side, key, address) \
    (OWNER_COUNTS(side) && POLLS(side, address) && knows[side] == key)

/* RENEW-5. */
inline send(side) {
    if
    :: renews(side) -> renewals[SENT(side, newest[side], knows[side])] = true
    :: else
    fi;
    messages[SENT(side, newest[side], knows[side])] = true
}

/* The same, and it arrives. */
inline say(side, peer) {
    if
    :: renews(side) && ACCEPTS(peer, newest[side], knows[side]) ->
        take_renewal(peer, newest[side], knows[side])
    :: else
    fi;
    if
    :: COUNTS(peer, newest[side], knows[side]) -> complete(peer, knows[side])
    :: else
    fi
}

/* An old message of the other side that changes something. */
#define OLD_RENEWAL(key, to) renewals[SENT(other, key, to)] && ACCEPTS(me, key, to)
#define OLD_MESSAGE(key, to) \
    messages[SENT(other, key, to)] && COUNTS(me, key, to) && COMPLETES(me, to)

proctype Side(byte me) {
    do
    :: atomic { !works && !renews(me) && newest[me] < KEYS -> newest[me]++ }
    /* What a side says that knows the thief's key goes to him alone. */
    :: atomic { !works && OWNER_COUNTS(me) -> send(me) }
    :: atomic { OLD_RENEWAL(2, 1) -> take_renewal(me, 2, 1) }
    :: atomic { OLD_RENEWAL(2, 2) -> take_renewal(me, 2, 2) }
    :: atomic { OLD_RENEWAL(2, 3) -> take_renewal(me, 2, 3) }
    :: atomic { OLD_RENEWAL(3, 1) -> take_renewal(me, 3, 1) }
    :: atomic { OLD_RENEWAL(3, 2) -> take_renewal(me, 3, 2) }
    :: atomic { OLD_RENEWAL(3, 3) -> take_renewal(me, 3, 3) }
    :: atomic { OLD_MESSAGE(1, 1) -> complete(me, 1) }
    :: atomic { OLD_MESSAGE(1, 2) -> complete(me, 2) }
    :: atomic { OLD_MESSAGE(1, 3) -> complete(me, 3) }
    :: atomic { OLD_MESSAGE(2, 1) -> complete(me, 1) }
    :: atomic { OLD_MESSAGE(2, 2) -> complete(me, 2) }
    :: atomic { OLD_MESSAGE(2, 3) -> complete(me, 3) }
    :: atomic { OLD_MESSAGE(3, 1) -> complete(me, 1) }
    :: atomic { OLD_MESSAGE(3, 2) -> complete(me, 2) }
    :: atomic { OLD_MESSAGE(3, 3) -> complete(me, 3) }
    /* RENEW-6, and the answer: RENEW-10, ROTATE-9. */
    :: atomic { works && renews(me) && !taken -> say(me, other); say(other, me) }
    od
}

#ifdef THIEF
proctype Thief() {
    do
    :: atomic { !stolen -> stolen = newest[0] }
    :: atomic { THIEF_COUNTS && !copied -> taken = true }
    :: atomic { THIEF_COUNTS && renews(0) && knows[1] + 1 == newest[0] -> copied = true }
    /* He announces the owner's newest address, and side 1 writes there. */
    :: atomic { (THIEF_COUNTS || taken) && knows[0] == newest[1] ->
#ifdef BY_ADDRESS
        complete(0, newest[0])
#else
        skip
#endif
    }
    od
}
#endif

init {
#ifdef THIEF
    atomic { run Side(0); run Side(1); run Thief() };
#else
    atomic { run Side(0); run Side(1) };
#endif
    works = true
}

#define understands(side, peer) \
    (knows[side] == newest[peer] || (renews(peer) && knows[side] + 1 == newest[peer]))
#define settled(side, peer) (!renews(side) && knows[peer] == newest[side])

ltl understood { [] (understands(0, 1) && understands(1, 0)) }
ltl agree { [] (works -> <> (settled(0, 1) && settled(1, 0))) }

#ifdef THIEF
#define is_late (stolen && knows[1] > stolen && !taken)
ltl shut { [] (is_late -> [] !taken) }
ltl told { [] ((stolen && confirmed[0] > stolen) -> (knows[1] > stolen && !taken)) }
ltl shows { [] (works -> <> ((settled(0, 1) && settled(1, 0)) || taken || copied)) }
ltl untaken { [] !taken }
#endif
