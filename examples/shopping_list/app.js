// @ts-check
/**
 * The page: draws what model.js and sync.js know, and hands them what the user does.
 * @module
 */

import { openCheck } from "./check.js";
import { Keeper } from "./db.js";
import {
  FullError,
  GoneError,
  ITEM_GONE,
  LIST_GONE,
  MAX_NAME_CHARS,
  MAX_QUANTITY_CHARS,
  MAX_TEXT_CHARS,
  Model,
  randomId,
  tidy,
} from "./model.js";
import { makeQr, pathOf } from "./qr.js";
import {
  attempt,
  codeImage,
  hush,
  icon,
  make,
  onSubmit,
  paced,
  part,
  prepareDialogs,
  reconcile,
  setText,
  showError,
  toast,
  wrong,
} from "./ui.js";
import { refusalsIn, renewalOf, warningOf } from "./words.js";

// Modules, beside the padding around the code.
const QUIET_ZONE = 2;
// So that "5 minutes ago" stays true.
const DRAW_AGAIN_MS = 30_000;
// From one drawing of what comes from others to the next: with a full list it takes a phone longer
// than they need to say something. What the user does is drawn at once.
const DRAW_PAUSE_MS = 200;
// No id in index.html has a colon, so no contact can give an item the id of another part.
const BOX_PREFIX = "box:";
const RELAY_TIMEOUT_MS = 6_000;
// PROTOCOL.md, "Limits".
const MAX_RELAYS = 3;
const APP_URL = new URL("./", location.href).href;

// First of all: an invitation goes out of the address, where history and screenshots would keep it.
// So do the relays that the address names: the user is asked about them once.
const offeredRelays = new URLSearchParams(location.search).getAll("relay").join(" ");
let invitation = takeInvitation();

/** @type {Model} */
let model;
/** @type {import("./sync.js").Sync | null} */
let sync = null;
// What was changed before sharing could begin.
/** @type {import("./model.js").Changes[]} */
const early = [];
// Settled once sharing works, or fails. On a slow network the library may come late.
let begun = Promise.resolve();
/** @type {Record<string, any>} */
const settings = {};
/** @type {Map<string, string>} */
const notices = new Map();
/** @type {Set<string>} */
const dismissed = new Set();
// The id of the list that is shown.
let current = "";
// The id of the list, item or contact that a dialog is about. Others may change what is shown while
// it is open.
let chosen = "";
// The id of the list to which the user has begun to add something; "" for the one that is shown.
let typedFor = "";
// Whatever arrives from now on is news.
let isDrawn = false;
const keeper = new Keeper(
  (words) => notify("storage", words),
  (changes, gone) => takeFromTab(changes, gone),
);

// ---------------------------------------------------------------------------------------
// Beginning.
// ---------------------------------------------------------------------------------------

/** Return the link in the page's address, or "", and remove it there. */
function takeInvitation() {
  const link = /[#?&]connectoid=/.test(location.href) ? location.href : "";
  if (link || offeredRelays) history.replaceState(null, "", location.pathname);
  return link;
}

async function begin() {
  prepareDialogs();
  connectParts();
  await keeper.open();
  const kept = await keeper.load();
  for (const { id, value } of kept.settings) settings[id] = value;
  if (!settings.device) await setSetting("device", randomId(11));
  model = new Model({ device: settings.device });
  const { lists, items } = model.load(/** @type {any} */ (kept));
  await keeper.write({ lists, items }, { items: model.purge().map(({ id }) => id) });
  show(settings.list);
  draw();
  isDrawn = true;
  begun = beginSync();
  await begun;
  await offerRelays();
  if (invitation) await confirmInvitation();
  setInterval(draw, DRAW_AGAIN_MS);
}

/** The lists work without it, also in a browser that lacks something. */
async function beginSync() {
  try {
    const { Sync } = await import("./sync.js");
    sync = new Sync({
      model,
      appUrl: APP_URL,
      iceServers: settings.turn ?? [],
      privacy: privacy(),
      onChange: drawSoon,
      onNews: (words) => toast(words),
      onDeleted: (id, words) => {
        // Closed once, it is news again.
        dismissed.delete(words);
        notify(`deleted by ${id}`, words);
      },
      load: async () => (await keeper.load()).contacts,
      write: (put, remove) => keeper.write(put, remove),
    });
    for (const changes of early.splice(0)) sync.changed(changes);
    useRelays();
    await sync.start();
  } catch (error) {
    console.error(error);
    notify(
      "sync",
      "Sharing does not work here: connectoid.js is missing, or this browser is too old. "
        + "Your lists are safe on this device.",
    );
  }
  draw();
}

async function beginOffline() {
  if (!navigator.serviceWorker) return;
  const policy = /** @type {any} */ (window).trustedTypes?.createPolicy("worker", {
    createScriptURL: () => "sw.js",
  });
  await navigator.serviceWorker.register(policy ? policy.createScriptURL("") : "sw.js", {
    updateViaCache: "none",
  });
}

/**
 * Another tab has changed something.
 * @param {import("./model.js").Changes} changes
 * @param {string[]} gone lists that are no longer kept
 */
function takeFromTab(changes, gone) {
  if (!model) return;
  sync?.changed(model.merge(changes));
  model.forget(gone);
  drawSoon();
}

// ---------------------------------------------------------------------------------------
// What the user changes: kept, sent, drawn.
// ---------------------------------------------------------------------------------------

/** @param {{lists?: any[], items?: any[]}} changes */
function changed({ lists = [], items = [] }) {
  keeper.write({ lists, items });
  if (sync) sync.changed({ lists, items });
  else early.push({ lists, items });
  draw();
}

/**
 * @param {string} id
 * @param {any} value
 */
async function setSetting(id, value) {
  settings[id] = value;
  await keeper.write({ settings: [{ id, value }] });
}

/** @param {string} id of a list; another one, or none, if it is not there */
function show(id) {
  const lists = model.openLists();
  current = lists.find((list) => list.id === id)?.id ?? lists[0]?.id ?? "";
  typedFor = "";
  if (current !== settings.list) setSetting("list", current);
}

/** @param {string} name */
function addList(name) {
  const list = model.addList(required(name, MAX_NAME_CHARS));
  show(list.id);
  changed({ lists: [list] });
  part("add-text").focus();
}

/** @param {string} id */
function deleteList(id) {
  const list = openList(id);
  changed({ lists: [model.changeList(id, { deleted: true })] });
  toast(
    `${list.name} is deleted${sharedWith(list.id).length ? ", for everybody" : ""}.`,
    "Undo",
    () => {
      const restored = model.changeList(id, { deleted: false });
      show(id);
      changed({ lists: [restored] });
    },
  );
}

/**
 * Return a list that is not deleted; throw GoneError.
 * @param {string} id
 */
function openList(id) {
  const list = model.lists.get(id);
  if (!list || list.deleted) throw new GoneError(LIST_GONE);
  return list;
}

function addItem() {
  const [text, quantity] = [part("add-text"), part("add-quantity")];
  // A contact may have deleted that list meanwhile. Who adds it once more means the one that is
  // shown now.
  const list = typedFor || current;
  typedFor = "";
  try {
    const item = model.addItem(
      openList(list).id,
      required(text.value, MAX_TEXT_CHARS),
      tidy(quantity.value, MAX_QUANTITY_CHARS),
    );
    changed({ items: [item] });
    say(`${item.text} is on the list.`);
    text.value = quantity.value = "";
  } catch (error) {
    if (error instanceof FullError || error instanceof GoneError) toast(error.message);
  }
  text.focus();
}

/** @param {any[]} items */
function deleteItems(items) {
  changeItems(items, { deleted: true });
  toast(
    items.length === 1
      ? `${items[0].text} is deleted.`
      : `${items.length} items are deleted.`,
    "Undo",
    () => changeItems(items, { deleted: false }),
  );
}

/**
 * Change all of these items that are still there; throw GoneError if none is.
 * @param {any[]} items
 * @param {{done?: boolean, deleted?: boolean}} changes
 */
function changeItems(items, changes) {
  const there = items.filter(({ id }) => model.items.has(id));
  if (!there.length) throw new GoneError(ITEM_GONE);
  changed({ items: there.map(({ id }) => model.changeItem(id, changes)) });
}

/**
 * @param {string} text
 * @param {number} maxChars
 */
function required(text, maxChars) {
  const clean = tidy(text, maxChars);
  if (!clean) throw new Error("Write something first.");
  return clean;
}

// ---------------------------------------------------------------------------------------
// Drawing.
// ---------------------------------------------------------------------------------------

const { soon: drawSoon, now: draw } = paced(drawAll, DRAW_PAUSE_MS);

function drawAll() {
  if (!model) return;
  if (!model.lists.get(current) || model.lists.get(current)?.deleted) {
    // What is typed was not for the list that is shown now.
    const former = typedFor;
    show("");
    typedFor = former;
  }
  drawLists();
  drawList();
  drawPeople();
  drawNotices();
}

function drawLists() {
  reconcile(part("lists"), model.openLists(), () => {
    const name = make("span", { className: "name" });
    const count = make("span", { className: "count" });
    const button = make("button", { type: "button" }, name, count);
    return Object.assign(make("li", {}, button), {
      update(/** @type {any} */ list) {
        const left = model.openCountOf(list.id);
        name.textContent = list.name;
        count.textContent = left ? String(left) : "";
        button.onclick = () => {
          show(list.id);
          draw();
        };
        if (list.id === current) button.setAttribute("aria-current", "true");
        else button.removeAttribute("aria-current");
      },
    });
  });
}

function drawList() {
  const list = model.lists.get(current);
  part("empty").hidden = Boolean(list);
  part("list").hidden = !list;
  if (!list) return;
  const items = model.itemsOf(current);
  const open = items.filter(({ done }) => !done);
  const done = items.filter((item) => item.done);
  part("title").textContent = list.name;
  document.title = `${list.name} · Shopping list`;
  const names = sharedWith(current);
  const words = [
    progressOf(open.length, done.length),
    ...(names.length ? [`Shared with ${names.join(", ")}`] : []),
  ];
  part("progress").replaceChildren(...words.flatMap((text) => [make("span", {}, text), " "]));
  part("meter").style.transform = `scaleX(${items.length ? done.length / items.length : 0})`;
  part("nothing").hidden = open.length > 0;
  part("nothing").textContent = done.length
    ? "All is in the basket."
    : "Nothing to buy. Add something above.";
  part("done-part").hidden = !done.length;
  const focused = /** @type {HTMLElement | null} */ (document.activeElement)
    ?.closest(".items li")
    ?.querySelector("input");
  reconcile(part("open-items"), open, makeItem);
  reconcile(part("done-items"), done, makeItem);
  // It may have gone to the other part.
  const same = focused && document.getElementById(focused.id);
  if (same && !focused.isConnected) same.focus({ preventScroll: true });
}

/**
 * @param {number} open
 * @param {number} done
 */
function progressOf(open, done) {
  if (!open) return done ? "All done" : "Empty";
  return done ? `${open} to buy, ${done} done` : `${open} to buy`;
}

/** @param {import("./model.js").Item} first */
function makeItem(first) {
  const box = make("input", { type: "checkbox", id: BOX_PREFIX + first.id });
  const [text, quantity] = [
    make("span", { className: "text" }),
    make("span", { className: "quantity" }),
  ];
  const edit = make("button", { type: "button", className: "icon-button" }, icon("edit"));
  const item = make("li", {}, make("label", {}, box, text, quantity), edit);
  if (isDrawn && first.by !== model.device) item.className = "fresh";
  box.onchange = () => {
    attempt(() => {
      changeItems([first], { done: box.checked });
      say(
        box.checked
          ? `${text.textContent} is in the basket.`
          : `${text.textContent} is to buy again.`,
      );
    });
  };
  edit.onclick = () => editItem(first.id);
  return Object.assign(item, {
    update(/** @type {import("./model.js").Item} */ { text: words, quantity: amount, done }) {
      if (setText(text, words)) edit.setAttribute("aria-label", `Change ${words}`);
      setText(quantity, amount);
      quantity.hidden = !amount;
      box.checked = done;
    },
  });
}

function drawPeople() {
  const people = sync?.people() ?? [];
  const blocked = sync?.blocked ?? "";
  part("blocked").textContent = blocked;
  part("blocked").hidden = !blocked;
  part("nobody").hidden = people.length > 0 || Boolean(blocked);
  reconcile(part("people"), people, makePerson);
}

function makePerson() {
  const names = [
    "avatar", "person-state", "person-lists", "warning", "verified", "renewing hint", "hint",
  ];
  const [avatar, state, lists, warning, verified, renewing, refused] = names.map((className) =>
    make("div", { className }),
  );
  const [name, words] = [make("span"), make("span")];
  warning.append(icon("warn"), words);
  verified.append(icon("check"), "Compared");
  avatar.setAttribute("aria-hidden", "true");
  state.setAttribute("role", "status");
  const buttons = Object.fromEntries(
    [
      ["connect", "Connect"],
      ["link", "Show link"],
      ["compare", "Compare"],
      ["rename", "Rename"],
      ["renew", "New key"],
      ["unshare", "Unshare"],
      ["keep", "OK"],
      ["drop", "Delete my copy"],
    ].map(([key, textContent]) => [
      key,
      make("button", {
        type: "button",
        className: key === "unshare" || key === "drop" ? "quiet danger" : "quiet",
        textContent,
      }),
    ]),
  );
  const head = make(
    "div",
    { className: "person-head" },
    avatar,
    make("div", {}, make("h3", {}, name, verified), state),
  );
  const card = make(
    "li",
    {},
    head,
    warning,
    renewing,
    lists,
    refused,
    make("div", { className: "person-buttons" }, ...Object.values(buttons)),
  );
  return Object.assign(card, {
    update(/** @type {any} */ person) {
      card.className = `person ${person.tone}`;
      avatar.textContent = [...person.nickname][0].toUpperCase();
      name.textContent = person.nickname;
      setText(state, person.words);
      lists.textContent = listNames(person.lists);
      lists.hidden = !lists.textContent;
      words.textContent = warningOf(person);
      warning.hidden = !words.textContent;
      verified.hidden = !person.verified || person.ended;
      renewing.textContent = renewalOf(person);
      renewing.hidden = !renewing.textContent;
      refused.textContent = refusalsIn(person.refused);
      refused.hidden = !person.refused;
      const isGone =
        person.ended && person.theirs.some((/** @type {string} */ id) => model.lists.has(id));
      const shown = {
        connect: person.asks,
        link: Boolean(person.link),
        compare: person.emoji.length > 0 && !person.ended,
        rename: !person.ended,
        renew: person.renewal === "possible",
        unshare: !person.ended && !sync?.blocked,
        keep: person.ended,
        drop: isGone,
      };
      buttons.keep.textContent = isGone ? "Keep my copy" : "OK";
      for (const [key, isShown] of Object.entries(shown)) {
        buttons[key].hidden = !isShown;
        buttons[key].setAttribute(
          "aria-label",
          `${buttons[key].textContent}: ${person.nickname}`,
        );
      }
      Object.assign(buttons.connect, { onclick: () => sync?.connect(person.id) });
      Object.assign(buttons.link, { onclick: () => showLink(person.nickname, person.link) });
      Object.assign(buttons.compare, { onclick: () => compare(person) });
      Object.assign(buttons.rename, {
        onclick: () =>
          askName(`Rename ${person.nickname}`, person.nickname, (to) =>
            sync?.rename(person.id, to),
          ),
      });
      Object.assign(buttons.renew, { onclick: () => askRenew(person) });
      Object.assign(buttons.unshare, { onclick: () => askUnshare(person) });
      Object.assign(buttons.keep, {
        onclick: () => sync?.dismiss(person.id, { deleteHere: false }),
      });
      Object.assign(buttons.drop, {
        onclick: () => sync?.dismiss(person.id, { deleteHere: true }),
      });
    },
  });
}

/** @param {string[]} ids */
function listNames(ids) {
  return ids
    .map((id) => model.lists.get(id))
    .filter((list) => list && !list.deleted)
    .map((list) => list?.name)
    .join(", ");
}

/** @param {string} id of a list */
function sharedWith(id) {
  const people =
    sync
      ?.people()
      .filter((person) => person.lists.includes(id) && !person.ended && !person.link) ?? [];
  return people.map(({ nickname }) => nickname);
}

function drawNotices() {
  const pill = part("network");
  const hasPeople = (sync?.people().length ?? 0) > 0;
  pill.hidden = navigator.onLine;
  pill.textContent = "Offline";
  if (sync?.relayTrouble && hasPeople && navigator.onLine) {
    notices.set("relay", `${sync.relayTrouble} Changes are kept, and go out later.`);
  } else notices.delete("relay");
  // A notice is behind the dialog.
  part("share-trouble").hidden = !sync?.relayTrouble;
  const shown = [...notices]
    .filter(([, words]) => !dismissed.has(words))
    .map(([id, words]) => ({ id, words }));
  reconcile(part("notices"), shown, ({ id }) => {
    const words = make("p");
    const close = make(
      "button",
      { type: "button", className: "icon-button", "aria-label": "Close this notice" },
      "✕",
    );
    close.onclick = () => {
      dismissed.add(words.textContent);
      draw();
    };
    return Object.assign(make("div", { className: "notice" }, icon("warn"), words, close), {
      update(/** @type {any} */ notice) {
        words.textContent = notice.words;
      },
    });
  });
}

/**
 * @param {string} id
 * @param {string} words
 */
function notify(id, words) {
  notices.set(id, words);
  drawSoon();
}

/**
 * Tell a screen reader what others see.
 * @param {string} words
 */
function say(words) {
  part("said").textContent = words;
}

// ---------------------------------------------------------------------------------------
// Dialogs.
// ---------------------------------------------------------------------------------------

/**
 * @param {string} title
 * @param {string} value
 * @param {(name: string) => unknown} done
 * @param {{label?: string, remove?: () => void}} [more]
 */
function askName(title, value, done, { label = "Name", remove } = {}) {
  part("name-title").textContent = title;
  part("name-label").textContent = label;
  part("name-text").value = value;
  part("name-error").textContent = "";
  part("name-delete").hidden = !remove;
  part("name-delete").onclick = () => {
    part("name-dialog").close();
    attempt(() => remove?.());
  };
  part("name-form").done = done;
  part("name-dialog").showModal();
  part("name-text").select();
}

function editList() {
  const { id, name: former } = openList(current);
  const rename = (/** @type {string} */ name) => {
    openList(id);
    changed({ lists: [model.changeList(id, { name })] });
  };
  askName("This list", former, rename, { remove: () => deleteList(id) });
}

/** @param {string} id */
function editItem(id) {
  const item = model.items.get(id);
  if (!item) return;
  chosen = id;
  part("item-text").value = item.text;
  part("item-quantity").value = item.quantity;
  part("item-error").textContent = "";
  part("item-dialog").showModal();
}

function saveItem() {
  const text = required(part("item-text").value, MAX_TEXT_CHARS);
  const quantity = tidy(part("item-quantity").value, MAX_QUANTITY_CHARS);
  if (model.items.get(chosen)?.deleted) throw new GoneError(ITEM_GONE);
  changed({ items: [model.changeItem(chosen, { text, quantity })] });
}

async function askShare() {
  const list = openList(current);
  chosen = list.id;
  const known =
    sync?.people().filter(({ lists, ended }) => !ended && !lists.includes(list.id)) ?? [];
  part("share-who").hidden = false;
  part("share-link").hidden = true;
  part("share-title").textContent = `Share ${list.name}`;
  part("share-name").value = part("share-error").textContent = "";
  part("share-others").hidden = !known.length;
  part("share-others-list").replaceChildren(
    ...known.map(({ id, nickname }) => {
      const avatar = make(
        "span",
        { className: "avatar", "aria-hidden": "true" },
        [...nickname][0].toUpperCase(),
      );
      return make(
        "li",
        {},
        make(
          "button",
          { type: "button", onclick: () => shareToo(id, nickname, list.id) },
          avatar,
          nickname,
        ),
      );
    }),
  );
  if (sync?.blocked) part("share-error").textContent = sync.blocked;
  part("share-relay").hidden = true;
  part("share-dialog").showModal();
  part("share-relay").hidden = await hasRelay();
}

/**
 * @param {string} id
 * @param {string} nickname
 * @param {string} list
 */
async function shareToo(id, nickname, list) {
  try {
    await sync?.shareToo(id, openList(list).id);
  } catch (/** @type {any} */ error) {
    showError("share-form", "share-error", error);
    return;
  }
  part("share-dialog").close();
  toast(`Shared with ${nickname}.`);
}

async function share() {
  // Another dialog may be about another list before all is done.
  const list = chosen;
  await begun;
  if (!sync) throw new Error("Sharing does not work here: see the notice at the top.");
  const name = required(part("share-name").value, MAX_NAME_CHARS);
  if (!(await hasRelay())) await setRelays(part("share-relay-url").value, "");
  const link = await sync.share(name, [openList(list).id]);
  navigator.storage?.persist?.();
  showLink(name, link);
  return "stay";
}

/**
 * @param {string} name
 * @param {string} link
 */
function showLink(name, link) {
  const grid = makeQr(link);
  const path = pathOf(grid).replace(
    /M(\d+) (\d+)/g,
    (_, x, y) => `M${Number(x) + QUIET_ZONE} ${Number(y) + QUIET_ZONE}`,
  );
  part("share-who").hidden = true;
  part("share-link").hidden = false;
  part("share-link-title").textContent = `A link for ${name}`;
  part("qr").replaceChildren(
    codeImage(path, grid.length + 2 * QUIET_ZONE, `QR code of the link for ${name}`),
  );
  part("share-url").value = link;
  part("copied").textContent = "";
  part("send").hidden = !navigator.share;
  part("send").onclick = () =>
    // The user changed their mind.
    navigator.share({ title: "Shopping list", url: link }).catch(() => {});
  part("copy").onclick = () => copy(link);
  if (!part("share-dialog").open) part("share-dialog").showModal();
  part("share-link-title").focus();
}

/** @param {string} link */
async function copy(link) {
  part("share-url").select();
  const isCopied = await navigator.clipboard?.writeText(link).then(
    () => true,
    () => false,
  );
  part("copied").textContent = isCopied
    ? "Copied. Paste it into a message."
    : "Copy the selected text.";
}

/** Ask before anything is sent: chat programs open links too. */
async function confirmInvitation() {
  await begun;
  let relays = [];
  try {
    if (!sync) throw new Error("Sharing does not work here: see the notice at the top.");
    relays = await sync.checkLink(invitation);
  } catch (/** @type {any} */ error) {
    notify("link", error.message);
    return;
  }
  notices.delete("link");
  part("connect-relays").textContent = relays.join(", ");
  part("connect-name").value = part("connect-error").textContent = "";
  part("connect-dialog").showModal();
}

async function connect() {
  await sync?.open(invitation, required(part("connect-name").value, MAX_NAME_CHARS));
  invitation = "";
  navigator.storage?.persist?.();
}

async function openPasted() {
  await begun;
  if (!sync) throw new Error("Sharing does not work here: see the notice at the top.");
  const link = part("link-text").value;
  await sync.checkLink(link);
  invitation = link;
  part("link-dialog").close();
  confirmInvitation();
}

/** @param {any} person */
function compare(person) {
  part("compare-title").textContent = `Compare with ${person.nickname}`;
  part("emoji").replaceChildren(
    ...person.emoji.map((/** @type {string[]} */ [sign, name]) =>
      make(
        "li",
        {},
        make("span", { className: "sign", "aria-hidden": "true" }, sign),
        make("span", {}, name),
      ),
    ),
  );
  part("emoji-same").onclick = async () => {
    part("compare-dialog").close();
    await sync?.verify(person.id, true);
    toast(`Nobody stands between you and ${person.nickname}.`);
  };
  part("emoji-differ").onclick = async () => {
    part("compare-dialog").close();
    hush();
    await sync?.verify(person.id, false);
    askUnshare(
      person,
      "Somebody may stand between you and read along. Unshare, then share again in another way, "
        + "ideally face to face with the QR code.",
    );
  };
  part("compare-dialog").showModal();
}

/** @param {any} person */
function askRenew({ id, nickname }) {
  chosen = id;
  part("renew-title").textContent = `A new key for ${nickname}?`;
  for (const name of document.querySelectorAll("#renew-form .nickname")) {
    name.textContent = nickname;
  }
  part("renew-error").textContent = "";
  part("renew-dialog").showModal();
}

async function renew() {
  await sync?.renew(chosen);
}

/**
 * @param {any} person
 * @param {string} [words]
 */
function askUnshare(person, words) {
  const has = (/** @type {string} */ id) => model.lists.has(id);
  const [given, got] = [
    person.lists.filter((/** @type {string} */ id) => has(id) && !person.theirs.includes(id)),
    person.theirs.filter(has),
  ];
  chosen = person.id;
  part("unshare-title").textContent = `Unshare with ${person.nickname}?`;
  part("unshare-text").textContent = words ?? endWords(person);
  part("unshare-there-row").hidden = !given.length || !person.connected;
  part("unshare-there-text").textContent =
    `Ask ${person.nickname}'s app to delete its copy of ${listNames(given)}.`;
  if (given.length && !person.connected && !person.link) {
    part("unshare-text").textContent +=
      " The app there is not connected now: "
      + `it will ask whether to keep the copy of ${listNames(given)}.`;
  }
  part("unshare-here-row").hidden = !got.length;
  part("unshare-here-text").textContent = `Delete my copy of ${listNames(got)} here.`;
  part("unshare-there").checked = part("unshare-here").checked = false;
  part("unshare-dialog").showModal();
}

/** @param {any} person */
function endWords({ link, nickname }) {
  if (link) return "The link no longer works.";
  return `Changes are no longer sent. ${nickname} is told as soon as a relay can be reached.`;
}

async function unshare() {
  await sync?.unshare(chosen, {
    deleteThere: part("unshare-there").checked,
    deleteHere: part("unshare-here").checked,
  });
}

// ---------------------------------------------------------------------------------------
// The relay.
// ---------------------------------------------------------------------------------------

/** @param {string} text addresses with spaces between */
const wordsOf = (text) => text.split(/\s+/).filter(Boolean);

function useRelays() {
  sync?.setRelays(wordsOf(settings.relay ?? ""), settings.relayKey ?? "");
}

/**
 * Ask whether new links go through the relays that the page's address names. Anybody can send
 * somebody such an address, and whoever runs a relay sees who uses it, and when.
 */
async function offerRelays() {
  // A URL is ASCII. Whatever else somebody wrote there is not shown.
  const urls = wordsOf(offeredRelays).filter((word) => URL.canParse(word));
  const offered = urls.map(relayUrl).join(" ");
  if (!offered || offered === settings.relay) return;
  part("relay-offered").textContent = offered;
  part("relay-now").textContent = settings.relay
    ? `Now they go through ${settings.relay}.`
    : "";
  part("relay-error").textContent = "";
  const dialog = part("relay-dialog");
  dialog.showModal();
  await new Promise((resolve) => {
    dialog.addEventListener("close", resolve, { once: true });
  });
}

/**
 * Return whether there is a relay for new links: in the settings, or this page's own server if it
 * is one.
 */
async function hasRelay() {
  if (settings.relay) return true;
  const own = `${location.origin}/`;
  if (!(await isRelay(own))) return false;
  sync?.setRelays([own], "");
  return true;
}

/** @param {string} word that a user or an address gave; one that is no URL stays as it is */
function relayUrl(word) {
  return URL.canParse(word) ? new URL(word).href : word;
}

/** @param {string} url */
async function isRelay(url) {
  return typeof (await documentOf(url))?.retention !== "undefined";
}

/**
 * Return what a server says of itself, if it is a relay; null if it is not, or does not answer.
 * @param {string} url
 * @returns {Promise<any>}
 */
async function documentOf(url) {
  try {
    const reply = await fetch(url, {
      headers: { Accept: "application/json" },
      credentials: "omit",
      redirect: "error",
      cache: "no-store",
      signal: AbortSignal.timeout(RELAY_TIMEOUT_MS),
    });
    return await reply.json();
  } catch {
    return null;
  }
}

/** @param {string} url */
function checkRelayUrl(url) {
  if (!/^https:|^http:\/\/(localhost|127\.)/.test(url)) {
    throw wrong("relay-url", "A relay is asked over https: its address begins with https://.");
  }
}

/**
 * Keep relays that answer; throw an error for another.
 * @param {string} text
 * @param {string} key
 */
async function setRelays(text, key) {
  const urls = wordsOf(text).map(relayUrl);
  if (!urls.length && part("share-dialog").open) {
    throw new Error(
      "Without a relay the two devices cannot find each other: write the address of one.",
    );
  }
  if (urls.length > MAX_RELAYS) {
    throw wrong("relay-url", `At most ${MAX_RELAYS} relays fit into a link. Remove some.`);
  }
  for (const url of urls) {
    checkRelayUrl(url);
    if (navigator.onLine && !(await isRelay(url))) {
      throw wrong("relay-url", `No relay answers at ${url}. Check the address.`);
    }
  }
  await setSetting("relay", urls.join(" "));
  await setSetting("relayKey", key);
  useRelays();
}

/** Return the TURN server that is typed in, if any; throw an error that says where it is wrong. */
async function turnServers() {
  const { checkIceServers } = await import("./lib.js");
  const urls = wordsOf(part("turn-url").value);
  const username = part("turn-user").value.trim();
  const credential = part("turn-password").value;
  if (!urls.length) {
    if (!username && !credential) return [];
    throw wrong("turn-url", "Which TURN server is it? Write its address, or remove its login.");
  }
  try {
    checkIceServers([{ urls, username: "any", credential: "any" }]);
  } catch (/** @type {any} */ error) {
    throw wrong("turn-url", error.message.replace("ICE server 1", "TURN server"));
  }
  if (!username) throw wrong("turn-user", "The TURN server needs a user name.");
  if (!credential) throw wrong("turn-password", "The TURN server needs a password.");
  return [{ urls, username, credential }];
}

/**
 * Throw an error where connections by TURN alone are wanted, and nothing brings a TURN server.
 * @param {RTCIceServer[]} turn
 */
async function checkRelayOnly(turn) {
  if (!part("relay-only").checked || turn.length || !navigator.onLine) return;
  const relays = wordsOf(part("relay-url").value || (settings.relay ?? "")).map(relayUrl);
  for (const url of relays.length ? relays : [`${location.origin}/`]) {
    if ((await documentOf(url))?.turn === true) return;
  }
  throw wrong(
    "relay-only",
    "For that you need a TURN server: your relay lends none, so write the address of one.",
  );
}

/** Return what others may learn by connecting. */
function privacy() {
  return { relayOnly: Boolean(settings.relayOnly), askFirst: Boolean(settings.askFirst) };
}

/**
 * Keep how connections are made.
 * @param {RTCIceServer[]} turn
 * @param {{relayOnly: boolean, askFirst: boolean}} wanted
 */
async function setConnecting(turn, wanted) {
  const before = [settings.turn ?? [], privacy()];
  if (JSON.stringify([turn, wanted]) === JSON.stringify(before)) return;
  await setSetting("turn", turn);
  await setSetting("relayOnly", wanted.relayOnly);
  await setSetting("askFirst", wanted.askFirst);
  // Connections that are there go on with what they had, so all begin anew.
  location.reload();
}

function askSettings() {
  const [turn] = settings.turn ?? [];
  part("turn-url").value = turn?.urls.join(" ") ?? "";
  part("turn-user").value = turn?.username ?? "";
  part("turn-password").value = turn?.credential ?? "";
  part("relay-only").checked = privacy().relayOnly;
  part("ask-first").checked = privacy().askFirst;
  part("relay-url").value = settings.relay ?? "";
  part("relay-key").value = settings.relayKey ?? "";
  part("settings-error").textContent = "";
  part("settings-dialog").showModal();
}

/** Check what is typed in: it may be right before it is saved. */
async function checkConnection() {
  showError("settings-form", "settings-error");
  try {
    const iceServers = await turnServers();
    const own = (await isRelay(`${location.origin}/`)) ? [`${location.origin}/`] : [];
    const named = wordsOf(part("relay-url").value).map(relayUrl);
    for (const url of named) checkRelayUrl(url);
    const key = part("relay-key").value.trim() || null;
    /** @type {[string, string | null][]} */
    const relays = (named.length ? named : own).map((url) => [url, key]);
    await openCheck({ relays, iceServers, relayOnly: part("relay-only").checked });
  } catch (/** @type {any} */ error) {
    showError("settings-form", "settings-error", error);
  }
}

// ---------------------------------------------------------------------------------------
// Buttons and forms.
// ---------------------------------------------------------------------------------------

function connectParts() {
  const clicks = {
    "open-settings": askSettings,
    check: checkConnection,
    "edit-list": editList,
    share: askShare,
    "new-list": () => askName("New list", "", addList),
    "have-link": () => {
      part("link-text").value = part("link-error").textContent = "";
      part("link-dialog").showModal();
    },
    "clear-done": () => deleteItems(model.itemsOf(current).filter(({ done }) => done)),
    "item-delete": () => {
      part("item-dialog").close();
      deleteItems([model.items.get(chosen) ?? { id: chosen }]);
    },
  };
  for (const [id, act] of Object.entries(clicks)) {
    part(id).addEventListener("click", () => attempt(act));
  }
  part("add").addEventListener("input", () => {
    typedFor = current;
  });
  part("add").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    addItem();
  });
  part("first-list").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    addList(part("first-name").value.trim() || "Groceries");
  });
  onSubmit("share-form", "share-error", share);
  onSubmit("connect-form", "connect-error", connect);
  onSubmit("link-form", "link-error", openPasted);
  onSubmit("name-form", "name-error", () =>
    part("name-form").done(required(part("name-text").value, MAX_NAME_CHARS)),
  );
  onSubmit("item-form", "item-error", saveItem);
  onSubmit("renew-form", "renew-error", renew);
  onSubmit("unshare-form", "", unshare);
  onSubmit("relay-form", "relay-error", () => setRelays(part("relay-offered").textContent, ""));
  onSubmit("settings-form", "settings-error", async () => {
    const turn = await turnServers();
    await checkRelayOnly(turn);
    await setRelays(part("relay-url").value, part("relay-key").value.trim());
    const [relayOnly, askFirst] = [part("relay-only").checked, part("ask-first").checked];
    await setConnecting(turn, { relayOnly, askFirst });
  });
  window.addEventListener("hashchange", () => {
    invitation = takeInvitation() || invitation;
    if (invitation) confirmInvitation();
  });
  for (const event of ["online", "offline"]) window.addEventListener(event, draw);
}

begin().catch((error) => {
  console.error(error);
  notify(
    "broken",
    "This page could not start. Load it again; if that does not help, use a newer browser.",
  );
  drawNotices();
});
// Without it the page still works online.
beginOffline().catch(() => {});
