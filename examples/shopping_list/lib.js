// @ts-check
/**
 * connectoid.js, wherever it is: two folders up, as in a checkout; or beside this file, when the folder was copied alone.
 * @module
 */

const BESIDE = "./connectoid.js";
/** @type {typeof import("../../connectoid.js")} */
const library = await import("../../connectoid.js").catch(() => import(BESIDE));

export const { Connectoid, EMOJI, Store, StoreError, makeLink, readLink } = library;
