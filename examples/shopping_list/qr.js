// @ts-check
/**
 * QR codes (ISO/IEC 18004) of text, in bytes, with error correction M: as much as a link needs,
 * and no more.
 * @module
 */

const MAX_VERSION = 40;
// For level M, by version from 1: error correction codewords of a block, and blocks.
const CORRECTION = [
  10, 16, 26, 18, 24, 16, 18, 22, 22, 26, 30, 22, 22, 24, 24, 28, 28, 26, 26, 26, 26, 28, 28, 28,
  28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28, 28,
];
const BLOCKS = [
  1, 1, 1, 2, 2, 4, 4, 4, 5, 5, 5, 8, 9, 9, 10, 10, 11, 13, 14, 16, 17, 17, 18, 20, 21, 23, 25,
  26, 28, 29, 31, 33, 35, 37, 38, 40, 43, 45, 47, 49,
];
/** @type {((row: number, column: number) => boolean)[]} */
const MASKS = [
  (row, column) => (row + column) % 2 === 0,
  (row) => row % 2 === 0,
  (_, column) => column % 3 === 0,
  (row, column) => (row + column) % 3 === 0,
  (row, column) => (Math.floor(row / 2) + Math.floor(column / 3)) % 2 === 0,
  (row, column) => ((row * column) % 2) + ((row * column) % 3) === 0,
  (row, column) => (((row * column) % 2) + ((row * column) % 3)) % 2 === 0,
  (row, column) => (((row + column) % 2) + ((row * column) % 3)) % 2 === 0,
];

/** @typedef {{size: number, dark: boolean[][], fixed: boolean[][]}} Grid */

/**
 * Return the modules of the code, true for dark, rows from the top; throw RangeError for more
 * than 2,331 bytes.
 * @param {string} text
 */
export function makeQr(text) {
  const octets = new TextEncoder().encode(text);
  const version = versionFor(octets.length);
  const codewords = interleave(version, encode(version, octets));
  const grids = MASKS.map((isMasked, mask) => {
    const grid = drawFixed(version);
    drawFormat(grid, mask);
    drawCodewords(grid, codewords, isMasked);
    return grid.dark;
  });
  return grids.reduce((best, grid) => (penalty(grid) < penalty(best) ? grid : best));
}

/**
 * Return the path of the dark modules, for an SVG of one unit a module.
 * @param {boolean[][]} grid
 */
export function pathOf(grid) {
  return grid
    .flatMap((row, y) => row.flatMap((isDark, x) => (isDark ? [`M${x} ${y}h1v1h-1z`] : [])))
    .join("");
}

// ---------------------------------------------------------------------------------------
// Codewords.
// ---------------------------------------------------------------------------------------

/** @param {number} version */
function countCodewords(version) {
  const alignments = version > 1 ? Math.floor(version / 7) + 2 : 0;
  const modules =
    (16 * version + 128) * version +
    64 -
    (version > 1 ? (25 * alignments - 10) * alignments - 55 : 0) -
    (version > 6 ? 36 : 0);
  return Math.floor(modules / 8);
}

/** @param {number} version */
const capacity = (version) =>
  countCodewords(version) - CORRECTION[version - 1] * BLOCKS[version - 1];

/** @param {number} count of bytes */
function versionFor(count) {
  for (let version = 1; version <= MAX_VERSION; version += 1) {
    // Including mode, length and end.
    if (count + (version < 10 ? 2 : 3) <= capacity(version)) return version;
  }
  throw new RangeError("This is too long for a QR code.");
}

/**
 * @param {number} version
 * @param {Uint8Array} octets
 */
function encode(version, octets) {
  const lengthBits = version < 10 ? 8 : 16;
  const bits =
    `0100${octets.length.toString(2).padStart(lengthBits, "0")}` +
    Array.from(octets, (octet) => octet.toString(2).padStart(8, "0")).join("");
  const room = 8 * capacity(version);
  const ended = bits + "0".repeat(Math.min(4, room - bits.length));
  const words = (ended + "0".repeat(-ended.length & 7)).match(/.{8}/g) ?? [];
  const codewords = words.map((word) => parseInt(word, 2));
  for (let pad = 0xec; codewords.length < capacity(version); pad ^= 0xec ^ 0x11) {
    codewords.push(pad);
  }
  return codewords;
}

/**
 * @param {number} version
 * @param {number[]} codewords
 */
function interleave(version, codewords) {
  const [blocks, correction] = [BLOCKS[version - 1], CORRECTION[version - 1]];
  const short = Math.floor(codewords.length / blocks);
  // The last blocks have one codeword more.
  const longOnes = codewords.length % blocks;
  const divisor = divisorOf(correction);
  let start = 0;
  const parts = Array.from({ length: blocks }, (_, place) => {
    const data = codewords.slice(start, (start += short + (place >= blocks - longOnes ? 1 : 0)));
    return { data, check: remainder(data, divisor) };
  });
  const column = (/** @type {"data" | "check"} */ kind, /** @type {number} */ place) =>
    parts.flatMap((part) => part[kind].slice(place, place + 1));
  return [
    ...Array.from({ length: short + 1 }, (_, place) => column("data", place)).flat(),
    ...Array.from({ length: correction }, (_, place) => column("check", place)).flat(),
  ];
}

/**
 * In GF(256) of the polynomial 0x11d.
 * @param {number} one
 * @param {number} other
 */
function multiply(one, other) {
  let product = 0;
  for (let bit = 7; bit >= 0; bit -= 1) {
    product = (product << 1) ^ ((product >> 7) * 0x11d);
    if ((other >> bit) & 1) product ^= one;
  }
  return product;
}

/**
 * Return the Reed-Solomon generator without its leading 1.
 * @param {number} degree
 */
function divisorOf(degree) {
  const divisor = [...Array(degree - 1).fill(0), 1];
  let root = 1;
  for (let step = 0; step < degree; step += 1) {
    for (let place = 0; place < degree; place += 1) {
      divisor[place] = multiply(divisor[place], root) ^ (divisor[place + 1] ?? 0);
    }
    root = multiply(root, 2);
  }
  return divisor;
}

/**
 * @param {number[]} data
 * @param {number[]} divisor
 */
function remainder(data, divisor) {
  const rest = divisor.map(() => 0);
  for (const codeword of data) {
    const factor = codeword ^ /** @type {number} */ (rest.shift());
    rest.push(0);
    divisor.forEach((coefficient, place) => {
      rest[place] ^= multiply(coefficient, factor);
    });
  }
  return rest;
}

// ---------------------------------------------------------------------------------------
// Modules.
// ---------------------------------------------------------------------------------------

/**
 * Draw all that does not depend on the text.
 * @param {number} version
 * @returns {Grid}
 */
function drawFixed(version) {
  const size = 4 * version + 17;
  const make = () => Array.from({ length: size }, () => Array(size).fill(false));
  const grid = { size, dark: make(), fixed: make() };
  for (let place = 0; place < size; place += 1) {
    set(grid, 6, place, place % 2 === 0);
    set(grid, place, 6, place % 2 === 0);
  }
  for (const [row, column] of [
    [3, 3],
    [3, size - 4],
    [size - 4, 3],
  ])
    drawSquare(grid, row, column, 4, [2, 4]);
  const centres = alignmentsOf(version);
  const last = centres.length - 1;
  centres.forEach((row, one) =>
    centres.forEach((column, other) => {
      const inCorner =
        (one === 0 && other === 0) ||
        (one === 0 && other === last) ||
        (one === last && other === 0);
      if (!inCorner) drawSquare(grid, row, column, 2, [1]);
    }),
  );
  if (version > 6) drawVersion(grid, version);
  return grid;
}

/**
 * @param {Grid} grid
 * @param {number} row
 * @param {number} column
 * @param {boolean} isDark
 */
function set(grid, row, column, isDark) {
  if (grid.dark[row]?.[column] === undefined) return;
  grid.dark[row][column] = isDark;
  grid.fixed[row][column] = true;
}

/**
 * @param {Grid} grid
 * @param {number} row
 * @param {number} column
 * @param {number} radius
 * @param {number[]} light distances
 */
function drawSquare(grid, row, column, radius, light) {
  for (let down = -radius; down <= radius; down += 1) {
    for (let right = -radius; right <= radius; right += 1) {
      set(
        grid,
        row + down,
        column + right,
        !light.includes(Math.max(Math.abs(down), Math.abs(right))),
      );
    }
  }
}

/** @param {number} version */
function alignmentsOf(version) {
  if (version === 1) return [];
  const count = Math.floor(version / 7) + 2;
  const step = version === 32 ? 26 : Math.ceil((4 * version + 4) / (2 * count - 2)) * 2;
  const rest = Array.from({ length: count - 1 }, (_, place) => 4 * version + 10 - place * step);
  return [6, ...rest.reverse()];
}

/**
 * Return the value, followed by its BCH code.
 * @param {number} value
 * @param {number} generator
 * @param {number} bits
 */
function withCode(value, generator, bits) {
  let rest = value;
  for (let step = 0; step < bits; step += 1) {
    rest = (rest << 1) ^ ((rest >> (bits - 1)) * generator);
  }
  return (value << bits) | rest;
}

/**
 * @param {Grid} grid
 * @param {number} version
 */
function drawVersion(grid, version) {
  const bits = withCode(version, 0x1f25, 12);
  for (let place = 0; place < 18; place += 1) {
    const [far, near] = [grid.size - 11 + (place % 3), Math.floor(place / 3)];
    set(grid, far, near, ((bits >> place) & 1) === 1);
    set(grid, near, far, ((bits >> place) & 1) === 1);
  }
}

/**
 * Level M is 0.
 * @param {Grid} grid
 * @param {number} mask
 */
function drawFormat(grid, mask) {
  const { size } = grid;
  const bits = withCode(mask, 0x537, 10) ^ 0x5412;
  const isDark = (/** @type {number} */ place) => ((bits >> place) & 1) === 1;
  const around = [
    [0, 8],
    [1, 8],
    [2, 8],
    [3, 8],
    [4, 8],
    [5, 8],
    [7, 8],
    [8, 8],
    [8, 7],
    [8, 5],
    [8, 4],
    [8, 3],
    [8, 2],
    [8, 1],
    [8, 0],
  ];
  around.forEach(([row, column], place) => set(grid, row, column, isDark(place)));
  for (let place = 0; place < 8; place += 1) set(grid, 8, size - 1 - place, isDark(place));
  for (let place = 8; place < 15; place += 1) set(grid, size - 15 + place, 8, isDark(place));
  set(grid, size - 8, 8, true);
}

/**
 * Two columns at a time from the right, up and down in turn.
 * @param {Grid} grid
 * @param {number[]} codewords
 * @param {(row: number, column: number) => boolean} isMasked
 */
function drawCodewords(grid, codewords, isMasked) {
  let [place, isUp] = [0, false];
  for (let right = grid.size - 1; right > 0; right -= right === 8 ? 3 : 2) {
    // Column 6 is the timing pattern.
    isUp = !isUp;
    for (let step = 0; step < grid.size; step += 1) {
      for (const column of [right, right - 1]) {
        const row = isUp ? grid.size - 1 - step : step;
        if (grid.fixed[row][column]) continue;
        const bit = ((codewords[place >> 3] ?? 0) >> (7 - (place & 7))) & 1;
        grid.dark[row][column] = (bit === 1) !== isMasked(row, column);
        place += 1;
      }
    }
  }
}

/**
 * How hard it is to read: runs, blocks, what looks like a corner, too dark or too light.
 * @param {boolean[][]} grid
 */
function penalty(grid) {
  const size = grid.length;
  const lines = [...grid, ...grid.map((_, column) => grid.map((row) => row[column]))].map(
    (line) => line.map((isDark) => (isDark ? "1" : "0")).join(""),
  );
  let points = 0;
  for (const line of lines) {
    for (const run of line.match(/0{5,}|1{5,}/g) ?? []) points += run.length - 2;
    for (const corner of ["10111010000", "00001011101"]) {
      for (let at = line.indexOf(corner); at >= 0; at = line.indexOf(corner, at + 1)) {
        points += 40;
      }
    }
  }
  for (let row = 1; row < size; row += 1) {
    for (let column = 1; column < size; column += 1) {
      const isDark = grid[row][column];
      if (
        [grid[row - 1][column], grid[row][column - 1], grid[row - 1][column - 1]].every(
          (other) => other === isDark,
        )
      )
        points += 3;
    }
  }
  const dark = grid.flat().filter(Boolean).length;
  return points + 10 * Math.floor(Math.abs(dark / size ** 2 - 0.5) * 20);
}
