/**
 * The vectors: vectors/library and vectors/relay/questions.json, for Node and browsers alike.
 *
 * `checks(load)` returns [name, check] for each case. A check rejects if the library does not agree
 * with the vector.
 */

import {
  CONTEXTS,
  Contact,
  EMOJI,
  LinkError,
  OtherAppError,
  Refused,
  RelayError,
  SystemSuite,
  checkSdp,
  checkSignature,
  comparisonString,
  decodeBase64url,
  encodeBase64url,
  formatAddress,
  hashCommitment,
  hasStun,
  hashJws,
  iceServers,
  makeLink,
  openMessage,
  parseAddress,
  parseInvitation,
  prove,
  readJws,
  readLink,
  sealMessage,
} from "../connectoid.js";
import { isTooLarge } from "../channel.js";
import { isPrivateHost } from "../networks.js";
import { trimSdp } from "../sdp.js";
import { asIceServer, readTurn } from "../turn.js";
import { originOf } from "../urls.js";
import { highestCommon } from "../versions.js";

const SUITE = new SystemSuite();
const utf8 = (text) => new TextEncoder().encode(text);
const fromHex = (hex) => Uint8Array.from(hex.match(/../g) ?? [], (pair) => parseInt(pair, 16));
const toHex = (octets) =>
  Array.from(octets, (octet) => octet.toString(16).padStart(2, "0")).join("");

/** Compare two values by what JSON says of them, members in any order. */
function same(actual, wanted, what = "") {
  const text = (value) =>
    JSON.stringify(value, (_, member) =>
      member && typeof member === "object" && !Array.isArray(member)
        ? Object.fromEntries(
            Object.entries(member).sort(([one], [other]) => (one < other ? -1 : 1)),
          )
        : member,
    );
  if (text(actual) !== text(wanted)) {
    throw new Error(
      `${what} is ${String(text(actual)).slice(0, 300)}, not ${String(text(wanted)).slice(0, 300)}`,
    );
  }
}

/** Return what work returns, or the class of its refusal. */
async function outcome(work) {
  try {
    return { value: await work() };
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    return { refused: error.reason };
  }
}

async function sameRefusal(work, wanted) {
  const { value, refused } = await outcome(work);
  same(refused, wanted, "the class of the refusal");
  return value;
}

// Enough of P-384 to find the public key of a scalar, which not every Web Crypto can do.
const P = 2n ** 384n - 2n ** 128n - 2n ** 96n + 2n ** 32n - 1n;
const G = [
  BigInt(
    "0xaa87ca22be8b05378eb1c71ef320ad746e1d3b628ba79b9859f741e082542a38"
    + "5502f25dbf55296c3a545e3872760ab7"),
  BigInt(
    "0x3617de4a96262c6f5d9e98bf9292dc29f8f41dbd289a147ce9da3113b5f0b8c0"
    + "0a60b1ce1d7e819d7a431d7c90ea0e5f"),
];

function invert(number) {
  let [old, rest, result, next] = [P, ((number % P) + P) % P, 0n, 1n];
  while (rest) [old, rest, result, next] = [rest, old % rest, next, result - (old / rest) * next];
  return result;
}

function add(one, other) {
  if (!one) return other;
  const slope =
    // Doubling: no point meets its negative below the order.
    one[0] === other[0]
      ? ((3n * one[0] * one[0] - 3n) * invert(2n * one[1])) % P
      : ((other[1] - one[1]) * invert(other[0] - one[0])) % P;
  const x = (slope * slope - one[0] - other[0]) % P;
  return [x, (slope * (one[0] - x) - one[1]) % P];
}

function multiply(scalar) {
  let [point, power] = [null, G];
  for (let left = scalar; left; left >>= 1n, power = add(power, power)) {
    if (left & 1n) point = add(point, power);
  }
  return point.map((number) =>
    encodeBase64url(fromHex(((number + P) % P).toString(16).padStart(96, "0"))),
  );
}

// Most occur many times.
const imported = new Map();

/** Return the key pair of a scalar in hex, as SystemSuite has it. */
export function importKey(scalar, name = "ECDH") {
  const key = imported.get(scalar + name) ?? importNew(scalar, name);
  imported.set(scalar + name, key);
  return key;
}

async function importNew(scalar, name) {
  const [x, y] = multiply(BigInt(`0x${scalar}`));
  const [jwk, algorithm] = [
    { kty: "EC", crv: "P-384", x, y },
    { name, namedCurve: "P-384" },
  ];
  const [privateUsages, publicUsages] =
    name === "ECDH" ? [["deriveBits"], []] : [["sign"], ["verify"]];
  const d = encodeBase64url(fromHex(scalar));
  return {
    privateKey: await crypto.subtle.importKey(
      "jwk",
      { ...jwk, d },
      algorithm,
      false,
      privateUsages,
    ),
    publicKey: await crypto.subtle.importKey("jwk", jwk, algorithm, true, publicUsages),
  };
}

async function readSigned(text) {
  const message = await readJws(text);
  await checkSignature(SUITE, message);
  return message;
}

async function parseWhole(address, allowed) {
  const mailboxes = parseAddress(address, allowed);
  for (const { pub } of mailboxes) await SUITE.check(pub);
  return mailboxes;
}

// ---------------------------------------------------------------------------------------
// One case of each file.
// ---------------------------------------------------------------------------------------

const DAMAGES = {
  missing: /^This is not an invitation link. Copy the whole link again.$/,
  "no secret": /^This link has no secret; ask for a new one\.$/,
  secret: /^This link is cut off or damaged\. /,
  address: /^This link is damaged: /,
  version: /^This link needs a newer version of this app\. /,
};

async function openLink(link) {
  const invitation = readLink(link);
  await Contact.open(SUITE, { wallUs: 1, monotonicS: 1 }, "Alice", invitation);
  return invitation;
}

const CHECKS = {
  async apps({ app, a, invitation: text, refused }) {
    const invitation = parseInvitation(text);
    const opened = Contact.open(SUITE, { wallUs: 1, monotonicS: 1 }, "Alice", invitation, { app });
    if (refused) {
      const error = await opened.catch((caught) => caught);
      if (!(error instanceof OtherAppError)) throw new Error(`not ${error}`);
      return;
    }
    const [{ record }] = await opened;
    same([toHex(invitation.appHash), record.app], [a, a ? app : ""]);
  },

  async versions({ ours, theirs, version, refused }) {
    for (const lists of [[ours, theirs], [theirs, ours]]) {
      same(await sameRefusal(() => highestCommon(...lists), refused), version);
    }
  },

  async base64url(each) {
    const octets = await sameRefusal(() => decodeBase64url(each.text), each.refused);
    if (octets) same([toHex(octets), encodeBase64url(octets)], [each.octets, each.text]);
  },

  async keys(each) {
    await sameRefusal(
      () => parseWhole(`${each.pub}.${encodeBase64url(utf8("https://relay.example.com/"))}`),
      each.refused,
    );
    if (!each.private) return;
    const sealed = await SUITE.seal(each.pub, CONTEXTS.message, utf8("for this key"));
    same(
      toHex(await SUITE.open(await importKey(each.private), CONTEXTS.message, sealed)),
      toHex(utf8("for this key")),
    );
  },

  async networks({ host, private: isPrivate }) {
    same([originOf(`https://${host}/`).host, isPrivateHost(host)], [host, isPrivate]);
  },

  async addresses(each) {
    const allowed = { allowHttp: each.allow_http ?? false };
    const mailboxes = await sameRefusal(() => parseWhole(each.address, allowed), each.refused);
    if (mailboxes) same([mailboxes, formatAddress(mailboxes)], [each.mailboxes, each.address]);
  },

  async links(each) {
    if (each.refused) {
      const error = await openLink(each.link).catch((caught) => caught);
      if (!(error instanceof LinkError && DAMAGES[each.damage].test(error.message))) {
        throw new Error(`not ${error}`);
      }
      return;
    }
    const { text, address, secret, commitment } = await openLink(each.link);
    same(
      [text, address, toHex(secret), toHex(commitment)],
      [each.invitation, each.address, each.secret, each.h],
    );
    same(parseAddress(address), each.mailboxes);
    same(readLink(makeLink("https://app.example.com/#old", text)).text, text);
  },

  async commitments(each) {
    same(
      encodeBase64url(await hashCommitment(each.from, each.r)) === each.h,
      each.refused !== "commitment",
    );
  },

  async seals(each) {
    const key = await importKey(each.private);
    const opened = await sameRefusal(
      () => SUITE.open(key, fromHex(each.info), fromHex(each.sealed)),
      each.refused,
    );
    if (opened) same(toHex(opened), each.plaintext);
  },

  async padding(each, files) {
    const key = await importKey(each.private);
    const text = await sameRefusal(() => openMessage(SUITE, key, each.data), each.refused);
    if (text === undefined) return;
    same(text, each.text);
    const [pub] = Object.entries(files.contexts.keys).find(
      ([, scalar]) => scalar === each.private,
    );
    const made = await SUITE.open(
      key,
      CONTEXTS.message,
      decodeBase64url(await sealMessage(SUITE, pub, text)),
    );
    same([1, 2, 4, 8, 16].find((kib) => kib * 1_024 >= 4 + text.length) * 1_024, made.length);
  },

  async jws(each) {
    const message = await sameRefusal(() => readSigned(each.text), each.refused);
    if (message) {
      same(
        [message.payload, message.hash, message.payload.from],
        [each.payload, each.hash, each.from],
      );
    }
  },

  async payloads(each) {
    const message = await sameRefusal(() => readSigned(each.text), each.refused);
    if (message) same([message.type, message.payload], [each.type, JSON.parse(each.payload)]);
  },

  async sdp(each) {
    const kept = await sameRefusal(() => checkSdp(each.sdp), each.refused);
    same(kept, each.kept);
  },

  async candidates(each) {
    const sent = trimSdp(each.sdp, { relayOnly: each.relay_only });
    const found = sent.split("\r\n").filter((line) => line.startsWith("a=candidate:"));
    same(found.sort(), [...each.candidates].sort());
  },

  async app_messages({ kind, part, times, closes }) {
    const text = part.repeat(times);
    same(isTooLarge(kind === "binary" ? fromHex(text) : text), closes);
  },

  async proofs(each) {
    const { jws, proof } = await readSigned(each.text);
    same((await prove(fromHex(each.secret), jws)) === proof, each.refused !== "proof");
  },

  async hashes(each) {
    same(await hashJws(each.text), each.hash);
  },

  async comparison(each) {
    const numbers = await comparisonString(each.invitation, each.hello, each.from, each.r);
    same([numbers, numbers.map((number) => EMOJI[number].join(" "))], [each.numbers, each.emoji]);
  },

  async contexts(each, files) {
    const { contexts, keys, now_us: nowUs } = files.contexts;
    const wallUs = each.now_us ?? nowUs;
    const before = await keep(contexts[each.context], wallUs);
    const contact = new Contact(SUITE, before);
    contact.privacy = { askFirst: each.ask_first };
    const boxes = new Map();
    for (const [at, { mailbox, data }] of each.found.entries()) {
      boxes.set(mailbox, [...(boxes.get(mailbox) ?? []), [at, data]]);
    }
    const effects = await contact.polled({ wallUs, monotonicS: 1_000 }, boxes);
    const dropped = each.refused ? { [each.refused]: each.times ?? 1 } : {};
    same(contact.dropped, dropped, "what was dropped");
    await checkSent(await sentBy(effects, keys), each.sent ?? []);
    same(
      effects.some(({ event }) => event === "opened_twice"),
      each.warned ?? false,
      "the warning",
    );
    const isAsked = effects.some(({ event }) => event === "wants_to_connect");
    same(isAsked, each.told === "wants_to_connect", "the question");
    if (!each.after) {
      const told = each.told ? [{ do: "tell", event: each.told }] : [];
      same([contact.record === before, effects], [true, told], "what was kept and done");
    }
    const known = after(contact.record);
    for (const [name, value] of Object.entries(each.after ?? {})) same(known[name], value, name);
  },

  async ice_servers(each) {
    const { relays, connectoid: contactAddress, documents, lent, more } = each;
    const withStun = Object.keys(documents).filter((url) => hasStun(documents[url]));
    const extra = more.map((urls) => ({ urls }));
    const known = new Map(Object.entries(lent));
    const servers = iceServers({ relays, contactAddress }, new Set(withStun), known, extra);
    const wanted = each.ice_servers.map((one) => (one.urls ? one : { urls: one }));
    same(servers, wanted);
  },

  async turn(each) {
    let server;
    try {
      server = readTurn(each.turn, each.relay);
    } catch (error) {
      same([error instanceof RelayError, each.refused], [true, "turn"], error.message);
      return;
    }
    same([asIceServer(server), server.ttlS], [each.ice_server, each.ttl_s]);
  },

  async seq(each, files) {
    const { contexts, keys } = files.contexts;
    const contact = new Contact(
      SUITE,
      await keep({ ...contexts["alice paired"], seq: each.last }, each.now_us),
    );
    const effects = await contact.connect({ wallUs: each.now_us, monotonicS: 1_000 });
    for (const [, text] of await sentBy(effects, keys)) {
      same((await readJws(text)).payload.seq, each.seq);
    }
    same(contact.record.seq, each.seq);
  },

  async pairings(each) {
    for (const name of ["alice", "bob"]) {
      const player = await Player.start(each, name);
      await player.play();
      same(player.contact.record.comparison, each.numbers);
      await player.connect();
      same([player.contact.record.state, player.contact.attempt.state], ["paired", "connected"]);
    }
  },

  async channel(each, files) {
    const player = await Player.start(files.pairings.cases[0], each.by);
    await player.play();
    const { contact } = player;
    const { attemptId } = contact.attempt;
    await player.do(contact.channelOpened(THEN, attemptId));
    for (const [place, octets] of each.received.entries()) {
      same(contact.attempt.state, "proving");
      await player.do(contact.channelMessage(THEN, attemptId, fromHex(octets)));
      if (place === 0 && each.written) same(toHex(player.written()), each.written);
    }
    const refused = each.refused === "channel";
    same(
      [
        contact.dropped.channel === 1,
        player.has({ do: "close", attemptId }),
        player.has({ do: "tell", event: "connected" }),
      ],
      [refused, refused, !refused],
    );
  },
};

// ---------------------------------------------------------------------------------------
// Messages in context.
// ---------------------------------------------------------------------------------------

async function own(known) {
  return known
    ? {
        address: known.address,
        keys: await Promise.all(known.private.map((scalar) => importKey(scalar))),
        ...("left_us" in known && { leftUs: known.left_us }),
      }
    : null;
}

/** Return the record of what a context knows. */
async function keep(known, rotatedUs) {
  const [invited, current, pending] = await Promise.all(
    ["invited", "current", "pending"].map((name) => own(known.addresses[name])),
  );
  const [replaced, former] = await Promise.all(["replaced", "former"].map((name) => (
    Promise.all((known.addresses[name] ?? []).map(own)))));
  const relays =
    known.state === "unshared"
      ? []
      : parseAddress((current ?? invited).address).map(({ url, ext }) => [url, ext]);
  return {
    version: 1,
    role: known.role,
    state: known.state,
    name: "",
    relays,
    privateKey: await importKey(known.private, "ECDSA"),
    signer: known.from,
    expiresUs: Infinity,
    invitation: known.invitation,
    linkHash: known.link_hash,
    oldPrivateKey: known.old_private ? await importKey(known.old_private, "ECDSA") : null,
    oldSigner: known.old_from,
    linkPrivateKey: known.link_private ? await importKey(known.link_private, "ECDSA") : null,
    linkSigner: known.link_from,
    renewalHashes: known.renewal_hashes,
    hello: known.hello,
    helloHash: known.hello_hash,
    welcome: known.welcome,
    welcomeHash: "",
    r: known.r,
    invited,
    current,
    pending,
    replaced,
    former,
    rotatedUs,
    contact: known.contact,
    formerContact: known.former_contact,
    contactAddress: known.connectoid,
    comparison: [],
    verified: false,
    differs: false,
    app: known.app ?? "",
    protocol: 1,
    seq: known.seq,
    seenSeq: known.seen_seq,
    keyNews: known.key_news,
    usedTo: [],
    why: "",
    namedRelays: [],
    met: known.met ?? [],
  };
}

/** Return what is known, by the names of the vectors. */
function after(record) {
  return {
    state: record.state,
    contact: record.contact,
    former_contact: record.formerContact,
    old_from: record.oldSigner,
    key_news: record.keyNews,
    connectoid: record.contactAddress,
    why: record.why,
    protocol: record.protocol,
    seen_seq: record.seenSeq,
    hello_hash: record.helloHash,
    numbers: record.comparison,
    met: record.met,
    current: record.current?.address ?? null,
    pending: record.pending?.address ?? null,
    replaced: record.replaced.map(({ address }) => address),
    former: record.former.map(({ address }) => address),
  };
}

/** Return the mailbox and the text of each message that is to be sent. */
async function sentBy(effects, keys) {
  return Promise.all(
    effects
      .filter((effect) => effect.do === "send")
      .map(async ({ mailbox: { pub }, data }) => [
        pub,
        await openMessage(SUITE, await importKey(keys[pub]), data),
      ]),
  );
}

async function checkSent(sent, wanted) {
  same(
    sent.map(([pub]) => pub),
    wanted.map(({ mailbox }) => mailbox),
    "where messages are sent",
  );
  for (const [place, [, text]] of sent.entries()) {
    const { payload } = await readSigned(text);
    for (const [name, value] of Object.entries(wanted[place].payload)) {
      same(payload[name], value, `${name} of what is sent`);
    }
    same(text, wanted[place].text ?? text, "the text that is sent");
  }
}

// ---------------------------------------------------------------------------------------
// Whole pairings: a side is played against the messages of the other.
// ---------------------------------------------------------------------------------------

const THEN = { wallUs: 1, monotonicS: 101 };

/** Return the real suite, with keys, random bytes and signatures of the vectors. */
function dealtSuite(keys, octets, texts) {
  const suite = new SystemSuite();
  suite.random = (count) => octets[count];
  suite.makeKey = async () => keys.shift();
  suite.sign = async (_, signed) => {
    const text = texts.find((whole) => whole.startsWith(`${String.fromCharCode(...signed)}.`));
    return decodeBase64url(text.split(".")[2]);
  };
  // With a key of its own.
  suite.seal = (...args) => SUITE.seal(...args);
  return suite;
}

/** Return the suite of a side, which deals what the vectors say that it has drawn. */
async function suiteOf(pairing, name, boxes) {
  const [, then] = pairing[name].addresses;
  const { challenge } = pairing.channel.challenges.find(({ by }) => by === name);
  const keys = await Promise.all(
    boxes.map(async ({ pub }, place) => [await importKey(then.private[place]), pub]),
  );
  const octets = {
    16: decodeBase64url(pairing.messages[0].payload.nonce),
    32: fromHex(challenge),
  };
  const texts = pairing.messages.map(({ text }) => text);
  return dealtSuite(keys, octets, texts);
}

/** Return what a side knows at the beginning, by the names of the vectors. */
function beginning(pairing, name, invitation) {
  const { addresses, private: secret, from } = pairing[name];
  const [here] = addresses;
  const known = {
    private: secret,
    from,
    invitation: invitation.text,
    hello: "",
    hello_hash: "",
    welcome: "",
    contact: "",
    seq: 0,
    seen_seq: 0,
  };
  if (name === "alice") {
    const { r } = pairing;
    const invited = { invited: here };
    return { ...known, role: "inviter", state: "invited", addresses: invited, r, connectoid: "" };
  }
  return {
    ...known,
    role: "opener",
    state: "opened",
    addresses: { current: here },
    r: "",
    connectoid: invitation.address,
  };
}

/** Return the private keys of all mailboxes of a pairing, by the public ones. */
function keysOf(pairing) {
  const addresses = [pairing.alice, pairing.bob].flatMap((side) => side.addresses);
  const pairs = addresses.flatMap(({ address, private: secrets }) =>
    parseAddress(address).map(({ pub }, place) => [pub, secrets[place]]),
  );
  return Object.fromEntries(pairs);
}

class Player {
  static async start(pairing, name) {
    const invitation = readLink(pairing.link);
    const [, then] = pairing[name].addresses;
    const boxes = parseAddress(then.address);
    const suite = await suiteOf(pairing, name, boxes);
    const record = await keep(beginning(pairing, name, invitation), 0);
    const relays = boxes.map(({ url, ext }) => [url, ext]);
    return Object.assign(new Player(), {
      pairing,
      name,
      contact: new Contact(suite, { ...record, relays }),
      sent: [],
      done: [],
      keys: keysOf(pairing),
    });
  }

  async do(promised) {
    const effects = await promised;
    this.done.push(...effects);
    this.sent.push(...(await sentBy(effects, this.keys)));
  }

  has(wanted) {
    return this.done.some((effect) =>
      Object.entries(wanted).every(([name, value]) => effect[name] === value),
    );
  }

  async play() {
    const { messages } = this.pairing;
    for (const [place, message] of messages.entries()) {
      if (message.by === this.name) {
        await this.send({ wallUs: message.payload.seq, monotonicS: 100 }, message);
      } else {
        await this.find(
          { wallUs: (messages[place + 1] ?? message).payload.seq, monotonicS: 100 },
          message,
        );
      }
    }
    same(this.sent, [], "what more was sent");
  }

  async send(now, message) {
    if (message.payload.type === "hello") await this.do(this.contact.connect(now));
    if (this.contact.attempt.state === "gathering") {
      const sdp = message.payload.sdpOffer ?? message.payload.sdpAnswer ?? null;
      await this.do(this.contact.gathered(now, this.contact.attempt.attemptId, sdp));
    }
    same(
      this.sent.splice(0),
      message.data.map(({ mailbox }) => [mailbox, message.text]),
      "what was sent",
    );
  }

  async find(now, message) {
    const boxes = (found) =>
      new Map(message.data.map(({ mailbox, data }) => [mailbox, found ? [[1, data]] : []]));
    if (message.fresh) await this.do(this.contact.polled(now, boxes(false)));
    await this.do(this.contact.polled(now, boxes(true)));
  }

  async connect() {
    const { offer, answer, info, challenges } = this.pairing.channel;
    const mine = challenges.find(({ by }) => by === this.name);
    const other = challenges.find(({ by }) => by !== this.name);
    const {
      attempt: { attemptId },
      attempt,
    } = this.contact;
    same([attempt.offer, attempt.answer], [offer, answer]);
    await this.do(this.contact.channelOpened(THEN, attemptId));
    const opened = await SUITE.open(
      await importKey(this.keys[mine.to]),
      fromHex(info),
      this.written(),
    );
    same(toHex(opened), mine.challenge);
    await this.do(this.contact.channelMessage(THEN, attemptId, fromHex(other.sealed)));
    same(toHex(this.written()), other.challenge);
    await this.do(this.contact.channelMessage(THEN, attemptId, fromHex(mine.challenge)));
    same(this.has({ do: "tell", event: "connected" }), true);
  }

  written() {
    return this.done.findLast((effect) => effect.do === "write").octets;
  }
}

// ---------------------------------------------------------------------------------------
// All of them.
// ---------------------------------------------------------------------------------------

async function checkQuestion(each, info, mayOpen) {
  const key = await importKey(each.private);
  const { value, refused } = await outcome(() =>
    SUITE.open(key, utf8(info), decodeBase64url(each.question)),
  );
  same(
    mayOpen ? String.fromCharCode(...value) : ["encoding", "seal"].includes(refused),
    mayOpen ? each.answer : true,
  );
}

/** Return [name, check] for each case; `load(name)` resolves to what is in vectors/NAME.json. */
export async function checks(load) {
  const names = Object.keys(CHECKS);
  const loaded = await Promise.all(names.map((name) => load(`library/${name}`)));
  const files = Object.fromEntries(names.map((name, place) => [name, loaded[place]]));
  const cases = names.flatMap((name) =>
    files[name].cases.map((each) => [`${name}: ${each.name}`, () => CHECKS[name](each, files)]),
  );
  const questions = await load("relay/questions");
  const { emoji } = await load("library/emoji");
  return [
    ...cases,
    ["emoji", async () => same(EMOJI, emoji)],
    ...questions.open.map((each) => [
      `question: ${each.title}`,
      () => checkQuestion(each, questions.info, true),
    ]),
    ...questions.must_not_open.map((each) => [
      `no question: ${each.title}`,
      () => checkQuestion(each, questions.info, false),
    ]),
  ];
}
