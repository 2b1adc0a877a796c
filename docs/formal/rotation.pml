/*
 * Rotation, when both sides move at once: PROTOCOL.md, "Rotation".
 *
 * Two paired sides. An address is a number, and a newer one has a larger number; 0 is none. The
 * network is as bad as can be: each message that was ever sent may arrive at any time, or never,
 * in any order, and again. A message that is not newer than the last accepted one is refused
 * (READ-23), so what is doubled changes nothing, and here it is left out.
 *
 * From some time on relays work: what is sent arrives if its recipient polls that address, though
 * old messages may still come in between.
 *
 * `reachable`: neither side ever lets go of the address that the other one writes to.
 * `meets`: once relays work, both come to have one address, which the other one knows.
 *
 * CHANGES is how often a user changes relays (ROTATE-4), MESSAGES how many messages each side
 * sends while the network is bad, ADDRESSES how many addresses each makes.
 *
 * A side numbers its addresses in the order in which it makes them. So the newest is the pending
 * one, unless it is the current one, and those in between are the replaced ones. With KEEPS_ONE a
 * side keeps one replaced address, as its former one: what ROTATE-4 must not be.
 */

#ifndef CHANGES
#define CHANGES 1
#endif
#ifndef CHANGES_OF_OTHER
#define CHANGES_OF_OTHER CHANGES
#endif
#ifndef MESSAGES
#define MESSAGES 4
#endif
#ifndef ADDRESSES
#define ADDRESSES 4
#endif

#define other (1 - me)
#define MOST_CHANGES(side) (side == 0 -> CHANGES : CHANGES_OF_OTHER)
#define AT(side, number) ((side) * (MESSAGES + 1) + (number))
#define is_pending(side) (newest[side] != current[side])
#ifdef KEEPS_ONE
#define POLLS(side, address) \
    (address == current[side] || address == newest[side] || address == former[side])
#define IS_TAKEN(side, address) (address == newest[side])
#else
#define POLLS(side, address) (address >= current[side] || address == former[side])
#define IS_TAKEN(side, address) (true)
#endif

/* An old message that counts and is at an address that is polled. MESSAGES is at most 5. */
#define ARRIVES(number) \
    (number > seen[me] && number <= seq[other] && POLLS(me, to[AT(other, number)]))

byte current[2] = 1;
byte former[2];
byte newest[2] = 1;
/* The address of the other side, as it was last told. */
byte knows[2] = 1;
/* The last number sent, and the last one accepted. */
byte seq[2];
byte seen[2];
byte changes[2];
/* What each message was sent to, and which address it announces. */
byte to[2 * (MESSAGES + 1)];
byte announces[2 * (MESSAGES + 1)];
bool works;
bool arrived;

/* A message to an address newer than the current one makes it current: ROTATE-2. */
inline take_into_use(side, address) {
    if
    :: address > current[side] && IS_TAKEN(side, address) ->
        former[side] = current[side];
        current[side] = address
    :: else
    fi
}

/* Make a new address in place of a pending one, which stays polled: ROTATE-4. */
inline make_address(side) {
#ifdef KEEPS_ONE
    if
    :: is_pending(side) -> former[side] = newest[side]
    :: else
    fi;
#endif
    newest[side]++
}

/* A message that arrives as soon as it is sent, if its address is polled. */
inline say(side, peer) {
    arrived = POLLS(peer, knows[side]);
    if
    :: arrived ->
        seen[peer] = MESSAGES;
        take_into_use(peer, knows[side]);
        knows[peer] = newest[side]
    :: else
    fi
}

/* An old message. What is older still is refused from now on, and so forgotten here. */
inline take(number) {
    knows[me] = announces[AT(other, number)];
    take_into_use(me, to[AT(other, number)]);
    do
    :: seen[me] < number ->
        seen[me]++;
        to[AT(other, seen[me])] = 0;
        announces[AT(other, seen[me])] = 0
    :: else -> break
    od
}

proctype Side(byte me) {
    do
    /* A rotation is due: ROTATE-6. */
    :: atomic { !works && !is_pending(me) && newest[me] < ADDRESSES -> make_address(me) }
    /* The user changes relays. */
    :: atomic { !works && changes[me] < MOST_CHANGES(me) && newest[me] < ADDRESSES ->
        changes[me]++;
        make_address(me) }
    /* Any numbered message, into the bad network. */
    :: atomic { !works && seq[me] < MESSAGES ->
        seq[me]++;
        to[AT(me, seq[me])] = knows[me];
        announces[AT(me, seq[me])] = newest[me] }
    /* Any message of the other side. */
    :: atomic { ARRIVES(1) -> take(1) }
    :: atomic { ARRIVES(2) -> take(2) }
    :: atomic { ARRIVES(3) -> take(3) }
    :: atomic { ARRIVES(4) -> take(4) }
    :: atomic { ARRIVES(5) -> take(5) }
    /* `moved`, and its answer: ROTATE-8, ROTATE-9. */
    :: atomic { works && is_pending(me) ->
        say(me, other);
        if
        :: arrived -> say(other, me)
        :: else
        fi;
        arrived = false }
    od
}

init {
    atomic { run Side(0); run Side(1) };
    works = true
}

#define reaches(side, peer) (POLLS(peer, knows[side]))
#define settled(side, peer) (!is_pending(side) && knows[peer] == current[side])

ltl reachable { [] (reaches(0, 1) && reaches(1, 0)) }
ltl meets { [] (works -> <> (settled(0, 1) && settled(1, 0))) }
