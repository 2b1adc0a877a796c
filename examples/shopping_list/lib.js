// @ts-check
/**
 * The library: the modules of a checkout, or one built file beside this one.
 *
 * The second is for a copy of this folder alone. `npm run build` in js/ makes that file.
 * @module
 */

const BESIDE = "./connectoid.js";
/** @type {typeof import("../../js/connectoid.js")} */
const library = await import("../../js/connectoid.js").catch(() => import(BESIDE));

export const {
  Connectoid, EMOJI, NotConnectedError, ROUTINE, RelayError, Store, StoreError, appOfContact,
  checkIceServers, examine, makeLink, parseAddress, readLink, shown,
} = library;
