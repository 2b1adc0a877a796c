// @ts-check
/**
 * Texts from outside, as people may see them: on a page, in a log, in the sentence of an error.
 *
 * Whoever sends a text decides what is in it: the end of a line and a second, forged one; a
 * direction of writing that turns a name round; blanks until the line breaks.
 * @module
 */

// Two or three lines of a terminal.
export const MAX_SHOWN_CHARS = 200;
const ELLIPSIS = "\u2026";
const REPLACEMENT = "\ufffd";
// Those of Unicode, the tab, and letters and symbols that look like nothing: two fillers of Hangul
// in three widths, and the empty pattern of Braille.
const BLANKS =
  /[\t \u00a0\u1680\u2000-\u200a\u202f\u205f\u3000\u115f\u1160\u2800\u3164\uffa0]+/g;
const UNPRINTABLE = /[\p{C}\p{Zl}\p{Zp}]/gu;

/**
 * Return a text from outside as a part of one line, of at most so many characters.
 *
 * Blanks are folded, and what is not printed is replaced. The middle of a long text is left out:
 * the end of a file's name says what it is.
 * @param {string} text
 * @param {number} [maxChars]
 */
export function shown(text, maxChars = MAX_SHOWN_CHARS) {
  const line = shortened(text, maxChars).replace(BLANKS, " ");
  return line.replace(UNPRINTABLE, REPLACEMENT).trim();
}

/**
 * @param {string} text
 * @param {number} maxChars
 */
function shortened(text, maxChars) {
  const chars = [...text];
  if (chars.length <= maxChars) return text;
  const tail = Math.floor(maxChars / 3);
  const head = maxChars - tail - ELLIPSIS.length;
  return [...chars.slice(0, head), ELLIPSIS, ...chars.slice(chars.length - tail)].join("");
}
