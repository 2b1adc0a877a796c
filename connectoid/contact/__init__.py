"""A contact: its state, and the next thing to do.

Theory
======

This package exports one class, Contact. It is a state machine without I/O. It owns no socket, no
thread and no file. It reads no clock. Its keys and random numbers come from a Suite. An event and
the time go in; a list of effects comes out. A runner (connectoid.runner, or a test with a fake
wire) executes the effects in order.

Two sides, two tables
---------------------

A contact has an inviter, who made the link, and an opener, who opened it. Each side runs one
machine, and each machine is in two states at a time.

PAIRING is the knowledge of the other side. It is saved and lasts for years:

    inviter     invited --hello--> welcomed --message--> paired
    opener      opened --welcome--> ready --message--> paired

The opener sends `hello` to the address in the link. The inviter binds the first hello that proves
knowledge of the link, and answers `welcome`. The link pins the inviter's key, so the opener knows
that the welcome is genuine, and answers `ready`. Now each side knows the other, and knows that
the other knows. Until then every message may get lost and is repeated. Afterwards nothing of the
pairing is needed any more. The user can leave from every state. That leads to `unshared`, a
tombstone that tells the other until it answers, for 30 days at most. `ended` keeps only a name and
a reason.

CONNECTING is the attempt to connect. It lasts for seconds and ends with the process:

    apart -> gathering -> waiting -> joining -> proving -> connected

The opener makes all offers. The inviter sends `call`, which asks for one. Both apps are offline
most of the time, so most of the table deals with offers that are too old, with calls and offers
that cross, and with attempts that fail. Each attempt has a number. Every effect for WebRTC and
every report from it carries that number, so late reports about a former peer connection are
ignored.

An open channel does not show where it leads: a contact could pass off somebody else's offer as
its own. So each side seals a challenge to the other's mailbox key. The seal is bound to the two
messages that made the channel. A side is connected when its challenge comes back.

The tables meet in three places. A hello or a welcome starts an attempt. A proven channel confirms
the pairing, as a message would. The end of a contact stops the attempt.

Rules
-----

A rule is a row of a table: in a state, an event, a function, and the states that may follow. The
function gets the machine and the arguments of the event. It returns the next state. The tables
hold the functions themselves and stand below them, at the end of pairing.py and connecting.py. An
event without a rule changes nothing: a message is refused as `unexpected`, a report from WebRTC
is ignored. A test draws the diagrams of PROTOCOL.md, "States", from the tables. The simulation
takes every rule.

A step
------

Each event is one step (`Machine.step`). Its functions replace the record by a changed one
(`keep`) and append effects. If the record has changed at the end, Save becomes the first effect.

Save comes first because the process may die at any moment. Suppose that a message leaves and its
`seq` is not saved. After a crash the next message has the same `seq`, and the other drops it as a
replay. Suppose that an address is announced and its private keys are not saved. Then every
message to it is lost. Suppose that the first hello is answered and not saved. Then a second one
can become the first. So nothing leaves before the record is durable. A crash after a Save can
lose a message. The other's repetition, or the next attempt, makes up for it.

Two things undo a step. A UsageError (bad relays, an SDP too long) restores the record and the
attempt, and no effect comes out. A Save that fails is followed by no other effect: the runner
drops the Contact and makes another from the record on disk, as after a crash. Cursors, digests
and counters are in neither record nor attempt. They are not restored, because nothing breaks if
they are lost or ahead.

A message from outside never raises. The first check that fails drops it, counts the reason in
`dropped`, and leaves the record and the attempt alone.

A round
-------

All mailboxes are checked together, and their messages are taken together. First each message is
read by itself: opened, parsed, compared with the address that it came to.
Then the messages are sorted, those of the pairing first and the others by `seq`, because the
mailboxes of an address need not be in step. Each message is checked against the record at that
point, and changes it at once if it passes. Only the newest message may ask for a connection, at
the end of the round. Of ten offers that waited for an hour, nine are waste.

Each message costs an operation with a key, or several, and others than the contact may have sent
it. So a round is noted (`inbox.note_round`) and then taken in as many steps as it needs, a few
messages in each (`inbox.go_on`). Other events may come between two of these steps. Each leaves a
record that is true, and a machine that is made anew reads all of it again.

A message is fresh if its mailbox was read to the end at most 75 s before. The sender of a fresh
offer still waits for the answer. The sender of a stale one may have gone, so the reply is `call`,
which brings a new offer from a sender who is still there.

Time
----

`Contact.tick` ends what has expired and begins what waits. It also says `moved` when an address has
served its time and no other message has announced a new one. So two apps that never connect
replace their keys like all others.

A signing key is replaced when the user asks for it (`Contact.renew`). From that step on the new
key signs. The old one signs nothing but `renew`, which goes ahead of every message until the
contact has written to the address that came with the new key.

From link to connection
-----------------------

Each entry is one step, with the functions that it goes through.

    inviter   Contact.invite: pairing.make_invitation; the app makes a link of `record.invitation`
    opener    Contact.open: pairing.take_invitation; connecting.begin, gather_offer
              Contact.gathered: connecting.take_gathered; outbox.send_hello
    inviter   Contact.polled: inbox.go_on, read, take, check_hello;
              pairing.take_hello, welcome; connecting.take_offer
              Contact.gathered: connecting.take_gathered; outbox.send_welcome
    opener    Contact.polled: inbox.check_welcome; pairing.take_welcome;
              connecting.take_answer; outbox.send_ready
    inviter   Contact.polled: inbox.check_numbered, take_numbered; pairing.confirm
    both      Contact.channel_opened: connecting.send_challenge
              Contact.channel_message: connecting.take_challenge
              Contact.channel_message: connecting.take_reply; pairing.confirm (the opener)

The rooms
---------

Each module knows only those above it.

    rules        the form of a table, and the names of the states
    record       the saved state
    effects      input and output
    machine      the working state, and the step
    rotation     addresses of one's own
    renewal      a new signing key in place of the old one
    outbox       a function for each message that is made: send_hello, send_welcome, ...
    connecting   attempts, offers and answers, the proof on the channel; CONNECTING
    pairing      from the link to the tombstone; PAIRING
    inbox        from sealed data to the function that takes the message
    contact      class Contact: a method for each event
"""

from connectoid.contact.connecting import CONNECTING
from connectoid.contact.contact import Contact
from connectoid.contact.effects import (
    EVENTS,
    Close,
    Effect,
    Forget,
    Gather,
    Join,
    Now,
    Poll,
    Privacy,
    Save,
    Send,
    Tell,
    Write,
)
from connectoid.contact.machine import Attempt
from connectoid.contact.pairing import PAIRING
from connectoid.contact.record import ContactRecord, OwnAddress
from connectoid.contact.rules import Rule

__all__ = [
    "CONNECTING",
    "EVENTS",
    "PAIRING",
    "Attempt",
    "Close",
    "Contact",
    "ContactRecord",
    "Effect",
    "Forget",
    "Gather",
    "Join",
    "Now",
    "OwnAddress",
    "Poll",
    "Privacy",
    "Rule",
    "Save",
    "Send",
    "Tell",
    "Write",
]
