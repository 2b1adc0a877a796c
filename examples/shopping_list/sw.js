// @ts-check
/**
 * The service worker keeps the page's own files.
 *
 * It serves them from the network while there is one, otherwise from its cache. Requests to relays
 * go past it.
 */

const CACHE = "shopping-list-1";
// After that time the cache is good enough.
const NETWORK_MS = 3_000;

const FILES = urls("./", [
  "./", "app.js", "check.js", "db.js", "icon-maskable.svg", "icon.svg", "lib.js",
  "manifest.webmanifest", "model.js", "qr.js", "style.css", "sync.js", "ui.js", "words.js",
]);
// As lib.js has them: the modules of a checkout, or one built file beside this one.
const MODULES = urls("../../js/", [
  "apps.js", "burst.js", "carrier.js", "channel.js", "comparison.js", "complaints.js",
  "connectoid.js", "contact/connecting.js", "contact/contact.js", "contact/effects.js",
  "contact/inbox.js", "contact/machine.js", "contact/outbox.js", "contact/pairing.js",
  "contact/record.js", "contact/renewal.js", "contact/rotation.js", "contact/rules.js",
  "doctor.js", "encoding.js", "errors.js", "ice.js", "limits.js", "line.js", "links.js",
  "messages.js", "networks.js", "page.js", "pauses.js", "probes.js", "refusals.js",
  "relay_client.js", "reports.js", "roster.js", "runner.js", "sdp.js", "sender.js", "shown.js",
  "steps.js", "store.js", "suite.js", "system.js", "turn.js", "urls.js", "versions.js",
  "webrtc.js",
]);
const BUILT = urls("./", ["connectoid.js"]);
const KEPT = new Set([...FILES, ...MODULES, ...BUILT]);

const worker = /** @type {any} */ (self);

/**
 * @param {string} folder
 * @param {string[]} paths
 */
function urls(folder, paths) {
  const base = new URL(folder, location.href);
  return paths.map((path) => new URL(path, base).href);
}

/**
 * Fetch a file and keep it.
 * @param {string} url
 */
async function renew(url) {
  const reply = await fetch(url, { cache: "no-cache", credentials: "omit" });
  if (!reply.ok) return reply;
  const cache = await caches.open(CACHE);
  await cache.put(url, reply.clone());
  return reply;
}

/** @param {string} url */
async function renewOrThrow(url) {
  const { ok } = await renew(url);
  if (!ok) throw new Error(`${url} is missing.`);
}

/** @param {string[]} wanted */
function renewAll(wanted) {
  return Promise.all(wanted.map(renewOrThrow));
}

async function install() {
  await renewAll(FILES);
  await renewAll(MODULES).catch(() => renewAll(BUILT));
  await worker.skipWaiting();
}

/** @param {string} url */
async function serve(url) {
  const cache = await caches.open(CACHE);
  const kept = await cache.match(url);
  const renewed = renew(url).catch(() => kept ?? Response.error());
  if (!kept) return renewed;
  const late = new Promise((resolve) => {
    setTimeout(() => resolve(kept), NETWORK_MS);
  });
  const reply = await Promise.race([renewed, late]);
  return reply.ok ? reply : kept;
}

worker.addEventListener("install", (/** @type {any} */ event) => {
  event.waitUntil(install());
});

worker.addEventListener("activate", (/** @type {any} */ event) => {
  event.waitUntil(worker.clients.claim());
});

worker.addEventListener("fetch", (/** @type {any} */ event) => {
  const { request } = event;
  const isPage = request.mode === "navigate";
  // A fetch() in the page has no destination: it goes to a relay.
  if (!isPage && !request.destination) return;
  const url = isPage ? FILES[0] : request.url.split(/[?#]/)[0];
  if (request.method === "GET" && KEPT.has(url)) event.respondWith(serve(url));
});
