/*
 * `seq`, and a thief who has copied the owner's signing key: PROTOCOL.md, "Members" and "Reading
 * a message".
 *
 * Time passes in ticks, and DAY of them are a day. In each tick the owner may send one message.
 * The thief sends what he likes, when he likes. The contact's clock may be ahead until somebody
 * sets it right.
 *
 * The claim: once the thief is silent and the contact's clock is right, a message of the owner that
 * does not count is followed, a day later, by one that does. (An `unshare` always counts: READ-23
 * and READ-31 leave it out, so there is nothing to explore.)
 */

#ifndef DAY
#define DAY 3
#endif
#ifndef TICKS
#define TICKS 12
#endif
#ifndef AHEAD
#define AHEAD 6
#endif

#define START (DAY + 1)
#define clock (now + ahead)
/* Sanity: without the limit of READ-31 and READ-32 the claim must fail. */
#ifdef WITHOUT_LIMIT
#define MOST 255
#else
#define MOST (clock + DAY)
#endif

byte now = START;
/* By how much the contact's clock is ahead. */
byte ahead;
/* The owner's last number, and the last one that the contact accepted. */
byte seq;
byte seen;
/* Ticks since a message of the owner was refused, while nothing else has changed; 0 is never. */
byte refused;
bool accepted;

/* READ-32, READ-23, READ-31. */
inline take(number) {
    accepted = false;
    if
    :: seen > MOST -> seen = 0
    :: else
    fi;
    if
    :: number > seen && number <= MOST ->
        seen = number;
        accepted = true
    :: else
    fi
}

/* MEMBER-2. */
inline number_next() {
    if
    :: now > seq -> seq = now
    :: else -> seq = seq + 1
    fi
}

active proctype World() {
    byte chosen;
    select(ahead : 0 .. AHEAD);
    do
    :: atomic { now < START + TICKS ->
        now++;
        if
        :: refused != 0 && refused <= DAY + 1 -> refused++
        :: else
        fi;
        /* The owner says something, or nothing. */
        if
        :: true ->
            number_next();
            take(seq);
            assert(accepted || ahead != 0 || refused <= DAY + 1);
            if
            :: accepted -> refused = 0
            :: !accepted && refused == 0 -> refused = 1
            :: else
            fi
        :: true
        fi }
    :: atomic { now < START + TICKS ->
        select(chosen : 1 .. START + TICKS + AHEAD + DAY);
        take(chosen);
        if
        :: accepted -> refused = 0
        :: else
        fi;
        chosen = 0 }
    :: atomic { ahead != 0 -> ahead = 0; refused = 0 }
    :: now == START + TICKS -> break
    od
}
