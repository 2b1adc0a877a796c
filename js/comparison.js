// @ts-check
/**
 * The comparison string: two people read it to each other to be sure that nobody stands between
 * them. PROTOCOL.md, "Comparison string".
 * @module
 */

import { toUtf8 } from "./encoding.js";
import { CONTEXTS, sha256, signingInput } from "./suite.js";

const ALL = (
  "🐶 Dog|🐱 Cat|🦁 Lion|🐎 Horse|🦄 Unicorn|🐷 Pig|🐘 Elephant|🐰 Rabbit|🐼 Panda|🐓 Rooster|"
  + "🐧 Penguin|🐢 Turtle|🐟 Fish|🐙 Octopus|🦋 Butterfly|🌷 Flower|🌳 Tree|🌵 Cactus|"
  + "🍄 Mushroom|🌏 Globe|🌙 Moon|☁️ Cloud|🔥 Fire|🍌 Banana|🍎 Apple|🍓 Strawberry|🌽 Corn|"
  + "🍕 Pizza|🎂 Cake|❤️ Heart|😀 Smiley|🤖 Robot|🎩 Hat|👓 Glasses|🔧 Spanner|🎅 Santa|"
  + "👍 Thumbs Up|☂️ Umbrella|⌛ Hourglass|⏰ Clock|🎁 Gift|💡 Light Bulb|📕 Book|✏️ Pencil|"
  + "📎 Paperclip|✂️ Scissors|🔒 Lock|🔑 Key|🔨 Hammer|☎️ Telephone|🏁 Flag|🚂 Train|🚲 Bicycle|"
  + "✈️ Aeroplane|🚀 Rocket|🏆 Trophy|⚽ Ball|🎸 Guitar|🎺 Trumpet|🔔 Bell|⚓ Anchor|"
  + "🎧 Headphones|📁 Folder|📌 Pin"
);

/**
 * The 64 emoji of the Matrix specification, "SAS method: emoji", in its order, with their names.
 */
export const EMOJI = ALL.split("|").map((both) => {
  const end = both.indexOf(" ");
  return [both.slice(0, end), both.slice(end + 1)];
});

const EMOJI_COUNT = 7;
const EMOJI_BITS = 6;

/**
 * Return seven indexes of EMOJI for the texts as they were sent.
 * @param {string} invitation
 * @param {string} hello in three or four parts
 * @param {string} inviter her signing key
 * @param {string} r
 */
export async function comparisonString(invitation, hello, inviter, r) {
  const texts = [invitation, signingInput(hello), inviter, r];
  const parts = texts.map((text) => toUtf8(`\0${text}`));
  const digest = await sha256(CONTEXTS.emoji, ...parts);
  const bits = Array.from(digest, (octet) => octet.toString(2).padStart(8, "0")).join("");
  const numbers = [];
  for (let number = 0; number < EMOJI_COUNT; number += 1) {
    const start = number * EMOJI_BITS;
    numbers.push(parseInt(bits.slice(start, start + EMOJI_BITS), 2));
  }
  return numbers;
}
