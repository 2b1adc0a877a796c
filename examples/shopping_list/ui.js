// @ts-check
/**
 * Small things to draw with. Text is always set as text: nothing that came from somebody else
 * becomes HTML.
 * @module
 */

const SVG = "http://www.w3.org/2000/svg";

/**
 * Return the element with this id.
 * @param {string} id
 * @returns {any}
 */
export function part(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`#${id} is missing.`);
  return found;
}

/**
 * Return a new element with these properties and children.
 * @param {string} tag
 * @param {Record<string, any>} [properties]
 * @param {...(Node | string)} children
 * @returns {any}
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else /** @type {any} */ (element)[name] = value;
  }
  element.append(...children);
  return element;
}

/**
 * Return whether this was another text before. An element whose text is set is laid out anew, even
 * if it is the same text: with 2,000 of them that takes half a second.
 * @param {HTMLElement} element
 * @param {string} text
 */
export function setText(element, text) {
  if (element.textContent === text) return false;
  element.textContent = text;
  return true;
}

/**
 * Return two ways to do some work: `now`, and `soon`, which waits until it was not done for a
 * while, and stands for all calls until then.
 * @param {() => void} work
 * @param {number} pauseMs
 */
export function paced(work, pauseMs) {
  /** @type {any} */
  let timer = null;
  let doneAt = -Infinity;
  const now = () => {
    clearTimeout(timer);
    timer = null;
    work();
    doneAt = Date.now();
  };
  const soon = () => {
    // Clocks are set back too.
    const sinceMs = Math.max(0, Date.now() - doneAt);
    timer ??= setTimeout(now, Math.max(0, pauseMs - sinceMs));
  };
  return { soon, now };
}

/** @param {string} name of a symbol in index.html */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(SVG, "use"));
  svg.firstElementChild?.setAttribute("href", `#i-${name}`);
  return svg;
}

/**
 * Return the picture of a path of square modules.
 * @param {string} path
 * @param {number} size
 * @param {string} label
 */
export function codeImage(path, size, label) {
  const svg = document.createElementNS(SVG, "svg");
  const drawn = document.createElementNS(SVG, "path");
  for (const [name, value] of Object.entries({
    viewBox: `0 0 ${size} ${size}`,
    role: "img",
    class: "code",
    "aria-label": label,
  })) {
    svg.setAttribute(name, value);
  }
  drawn.setAttribute("d", path);
  drawn.setAttribute("shape-rendering", "crispEdges");
  svg.append(drawn);
  return svg;
}

/**
 * Have one child for each record, in their order; children stay, so that the focus does. `create`
 * makes a child with `update(record)`.
 * @template {{id: string}} T
 * @param {HTMLElement} parent
 * @param {T[]} records
 * @param {(record: T) => HTMLElement & {update: (record: T) => void}} create
 */
export function reconcile(parent, records, create) {
  const former = new Map(
    [...parent.children].map((child) => [/** @type {HTMLElement} */ (child).dataset.id, child]),
  );
  records.forEach((record, place) => {
    const child = /** @type {any} */ (former.get(record.id) ?? create(record));
    former.delete(record.id);
    if (child.dataset.id !== record.id) child.dataset.id = record.id;
    child.update(record);
    if (parent.children[place] !== child) {
      parent.insertBefore(child, parent.children[place] ?? null);
    }
  });
  for (const child of former.values()) child.remove();
}

/** Let dialogs be closed by their buttons and by a click beside them. */
export function prepareDialogs() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      const target = /** @type {HTMLElement} */ (event.target);
      if (target === dialog || target.closest("[data-close]")) dialog.close();
    });
  }
}

/**
 * Return an error about what was put into a field.
 * @param {string} field
 * @param {string} words
 */
export function wrong(field, words) {
  return Object.assign(new Error(words), { field });
}

/**
 * Show what is wrong with a form, and at which of its fields; show nothing without an error.
 * @param {string} form
 * @param {string} errorPart or ""
 * @param {{message: string, field?: string}} [error]
 */
export function showError(form, errorPart, error) {
  for (const one of part(form).querySelectorAll("[aria-invalid]")) {
    one.removeAttribute("aria-invalid");
  }
  if (errorPart) part(errorPart).textContent = error?.message ?? "";
  const field = error?.field && part(form).querySelector(`#${error.field}`);
  field?.setAttribute("aria-invalid", "true");
  field?.focus();
}

/**
 * Do a form's work; then show the error's sentence, or close its dialog.
 * @param {string} form
 * @param {string} errorPart or ""
 * @param {() => unknown} work may return "stay"
 */
export function onSubmit(form, errorPart, work) {
  part(form).addEventListener("submit", async (/** @type {any} */ event) => {
    event.preventDefault();
    showError(form, errorPart);
    try {
      if ((await work()) !== "stay") part(form).closest("dialog")?.close();
    } catch (/** @type {any} */ error) {
      showError(form, errorPart, error);
    }
  });
}

/**
 * Do what a button is for, or say what is in the way.
 * @param {() => unknown} work
 */
export async function attempt(work) {
  try {
    await work();
  } catch (/** @type {any} */ error) {
    toast(error.message);
  }
}

let toastTimer = 0;
const TOAST_MS = 7_000;
// What is said once the button that is there has gone: nobody else takes an Undo away.
let waiting = "";

/**
 * Say something for a while, with a button to act on it; without one, after one that is there.
 * @param {string} words
 * @param {string} [label]
 * @param {() => void} [act]
 */
export function toast(words, label = "", act = () => {}) {
  if (!label && part("toast").querySelector("button")) {
    waiting = words;
    return;
  }
  const button = make("button", {
    type: "button",
    textContent: label,
    onclick: () => {
      sayNext();
      attempt(act);
    },
  });
  part("toast").replaceChildren(make("p", {}, words), ...(label ? [button] : []));
  clearTimeout(toastTimer);
  toastTimer = setTimeout(sayNext, TOAST_MS);
}

function sayNext() {
  const words = waiting;
  hush();
  if (words) toast(words);
}

/** Take back what is said: it no longer holds. */
export function hush() {
  waiting = "";
  part("toast").replaceChildren();
}
