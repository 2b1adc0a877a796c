// @ts-check
/**
 * Texts from outside, as people may see them: on a page, in a log, in the sentence of an error.
 *
 * Whoever sends a text decides what is in it: the end of a line and a second, forged one; a
 * direction of writing that turns a name round; blanks until the line breaks. Text of any script
 * stays as it is, with the joiners of its letters and emoji.
 * @module
 */

// Two or three lines of a terminal.
export const MAX_SHOWN_CHARS = 200;
const ELLIPSIS = "\u2026";
const REPLACEMENT = "\ufffd";
// Control characters, lone surrogates, and what ends lines or changes the direction of text.
export const UNPRINTABLE = /[\p{Cc}\p{Cs}\u2028-\u202e\u2066-\u2069]/u;
const ALL_UNPRINTABLE = new RegExp(UNPRINTABLE, "gu");
// What looks like a blank or like nothing: the blanks of Unicode, what has no width, two fillers of
// Hangul in three widths, and the empty pattern of Braille. One alone may be part of a word.
const BLANK = "[\\t \\u00a0\\u115f\\u1160\\u1680\\u2000-\\u200d\\u202f\\u205f\\u2060\\u2800\\u3000"
  + "\\u3164\\ufeff\\uffa0]";
const BLANKS = new RegExp(`${BLANK}{2,}|\\t|^${BLANK}|${BLANK}$`, "gu");
const ZERO_WIDTH_JOINER = "\u200d";
// Marks, and what changes the emoji before it: variants, skin tones and tags.
const MODIFIER = /[\p{M}\u200d\u{1f3fb}-\u{1f3ff}\u{e0020}-\u{e007f}]/u;
// Two of these letters are a flag.
const FLAG_LETTER = /[\u{1f1e6}-\u{1f1ff}]/u;
// Of one character as people see it: a family of four with skin tones has eleven. A letter with
// more marks than that is no text.
const MAX_GRAPHEME_CHARS = 32;

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
  return line.replace(ALL_UNPRINTABLE, REPLACEMENT).replace(/^ | $/gu, "");
}

/**
 * Return the last place up to `end` where a cut leaves whole what people see as a character.
 * @param {string[]} chars
 * @param {number} end
 */
function cutBefore(chars, end) {
  for (let place = end; place > Math.max(0, end - MAX_GRAPHEME_CHARS); place -= 1) {
    if (place === chars.length || !isInside(chars, place)) return place;
  }
  return end;
}

/**
 * Return whether what is on both sides of a place is one character to people.
 * @param {string[]} chars
 * @param {number} place
 */
function isInside(chars, place) {
  if (FLAG_LETTER.test(chars[place])) {
    let start = place;
    while (start > 0 && FLAG_LETTER.test(chars[start - 1])) start -= 1;
    return (place - start) % 2 === 1;
  }
  return MODIFIER.test(chars[place]) || chars[place - 1] === ZERO_WIDTH_JOINER;
}

/**
 * @param {string} text
 * @param {number} maxChars
 */
function shortened(text, maxChars) {
  const chars = [...text];
  if (chars.length <= maxChars) return text;
  const tail = chars.slice(cutBefore(chars, chars.length - Math.floor(maxChars / 3)));
  const head = cutBefore(chars, Math.max(0, maxChars - tail.length - ELLIPSIS.length));
  return [...chars.slice(0, head), ELLIPSIS, ...tail].join("");
}
