/*
 * Addresses of one side, and a thief who has copied its contact's device: PROTOCOL.md, "Rotation".
 *
 * A side numbers its addresses in the order in which it makes them. The thief hears of each at
 * once, and writes to any of them when he likes. The owner of the device hears of the newest one
 * some time, or never, and what she knows is the last that she has heard of. Time passes in ticks,
 * and MONTH of them are 30 days. The user of this side changes relays or renews at any time.
 *
 * The claim: the address that the owner knows is polled until a month has passed since the thief
 * first wrote to a newer one. So she can be heard for a month: she unshares, or renews.
 *
 * With AT_ONCE a former address goes with the next one, however soon that is, as ROTATE-3 once had
 * it. With FROM_MAKING a rotation is due a month after an address was made, though it may have come
 * into use just now, as ROTATE-6 once had it. With STAYS the user changes nothing.
 */

#define MONTH 3
#define ADDRESSES 7

byte newest = 1;
byte current = 1;
/* All from this one to the newest are polled. */
byte oldest = 1;
byte known = 1;
/* Ticks, a month at most: since the newest was made or the current one came into use; since the
 * former ones were left; since a newer one than the owner knows came into use. */
byte age = MONTH;
byte left = MONTH;
byte behind;

inline announce() {
    newest++;
    age = 0
}

/* ROTATE-2, ROTATE-3. */
inline take(address) {
    if
    :: current <= known && address > known -> behind = 0
    :: else
    fi;
    if
#ifdef AT_ONCE
    :: true -> oldest = current
#else
    :: left >= MONTH -> oldest = current
    :: else
#endif
    fi;
    current = address;
    left = 0;
#ifndef FROM_MAKING
    age = 0
#endif
}

inline older(ticks) {
    if
    :: ticks < MONTH -> ticks++
    :: else
    fi
}

init {
    byte address;
    do
#ifndef STAYS
    :: atomic { newest < ADDRESSES -> announce() }
#endif
    /* ROTATE-6 */
    :: atomic { newest < ADDRESSES && newest == current && age >= MONTH -> announce() }
    /* The owner hears of it. */
    :: atomic { known < newest -> known = newest; behind = 0 }
    /* The thief writes to it, or to an older one that waits. */
    :: atomic {
        current < newest -> address = current + 1;
        do
        :: address < newest -> address++
        :: break
        od;
        take(address);
        address = 0
       }
    :: atomic { older(age); older(left); older(behind) }
    od
}

#define is_heard (known >= oldest || behind >= MONTH)

ltl heard { [] is_heard }
