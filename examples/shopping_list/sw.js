// @ts-check
/**
 * The service worker: the page's own files, from the network while there is one, else as they were kept. It touches
 * nothing else: requests to relays go by it.
 */

const CACHE = "shopping-list-1";
const NETWORK_MS = 3_000; // then what is kept is good enough
const FILES = ["./", "app.js", "db.js", "icon.svg", "icon-maskable.svg", "lib.js", "manifest.webmanifest", "model.js", "qr.js",
  "style.css", "sync.js", "ui.js"].map((path) => new URL(path, location.href).href);
const LIBRARIES = ["../../connectoid.js", "connectoid.js"].map((path) => new URL(path, location.href).href); // as in lib.js
const worker = /** @type {any} */ (self);

/** Fetch a file and keep it. @param {string} url */
async function renew(url) {
  const reply = await fetch(url, { cache: "no-cache", credentials: "omit" });
  if (!reply.ok) return reply;
  const cache = await caches.open(CACHE);
  await cache.put(url, reply.clone());
  return reply;
}

async function install() {
  await Promise.all(FILES.map(async (url) => {
    if (!(await renew(url)).ok) throw new Error(`${url} is missing.`);
  }));
  await renew(LIBRARIES[0]).then((reply) => (reply.ok ? reply : renew(LIBRARIES[1])));
  await worker.skipWaiting();
}

/** @param {string} url */
async function serve(url) {
  const kept = await (await caches.open(CACHE)).match(url);
  const renewed = renew(url).catch(() => kept ?? Response.error());
  if (!kept) return renewed;
  const late = new Promise((resolve) => setTimeout(() => resolve(kept), NETWORK_MS));
  return Promise.race([renewed, late]).then((reply) => (reply.ok ? reply : kept));
}

worker.addEventListener("install", (/** @type {any} */ event) => event.waitUntil(install()));
worker.addEventListener("activate", (/** @type {any} */ event) => event.waitUntil(worker.clients.claim()));
worker.addEventListener("fetch", (/** @type {any} */ event) => {
  const { request } = event;
  if (request.mode !== "navigate" && !request.destination) return; // fetch() in the page: what goes to a relay
  const url = request.mode === "navigate" ? FILES[0] : request.url.split(/[?#]/)[0];
  if (request.method === "GET" && [...FILES, ...LIBRARIES].includes(url)) event.respondWith(serve(url));
});
