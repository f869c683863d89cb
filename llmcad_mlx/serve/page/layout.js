// Where the nodes of a token tree go: depth from left to right, branches below each other.

const GLYPH = 7.3; // px, of the 12 px monospaced label; most scripts beyond Latin, Greek and Cyrillic are twice as wide
const PADDING = 15; // px, both sides of a label
const GAP = 20; // px between columns, where the edges are
const LONGEST = 12; // characters of a label

/**
 * @typedef {object} Place
 * @property {number} depth  0 is the root
 * @property {number} x  left edge, px
 * @property {number} row
 * @property {number} width  px
 * @property {string} label
 * @property {number} reach  cumulative confidence, the product along the branch
 */

/**
 * Children are ordered: the accepted one first, then by confidence. A node is in the row of its first child, so the
 * accepted path is a straight line at the top. The bonus token follows it, as one more place at the end.
 *
 * @param {import("./answer.js").Round} round
 * @returns {{places: Place[], rows: number, width: number, end: number}}  `end`: the node the bonus token follows
 */
export function layOut(round) {
  const { nodes } = round;
  const end = nodes.findLastIndex(({ state }) => state === "accepted" || state === "root");
  const places = nodes.map((node) => ({ label: label(node.text) }));
  const children = nodes.map(() => []);
  nodes.forEach(({ parent, confidence }, index) => {
    const above = places[parent];
    places[index].depth = above ? above.depth + 1 : 0;
    places[index].reach = above ? above.reach * confidence : 1;
    if (above) children[parent].push(index);
  });
  if (round.bonus) {
    children[end].push(nodes.length);
    places.push({ label: label(round.bonus.text), depth: places[end].depth + 1, reach: 1 });
    children.push([]);
  }
  const rows = giveRows(places, children, (index) => rank(nodes[index]));
  const width = giveColumns(places);
  return { places, rows, width, end };
}

/** Visible text of a token: spaces and line breaks as signs, long ones cut. */
export function label(text) {
  const shown = text.replace(/ /g, "␣").replace(/\r?\n/g, "⏎").replace(/\t/g, "⇥");
  const glyphs = [...shown];
  if (!glyphs.length) return "∅";
  return glyphs.length > LONGEST ? `${glyphs.slice(0, LONGEST - 1).join("")}…` : shown;
}

function rank(node) {
  if (!node) return 3; // the bonus token
  return node.state === "accepted" ? 2 : node.confidence;
}

/**
 * A line of first children is straight. The branches beside it go below, the deepest first, each as high as its own
 * line is free: then no two nodes overlap and no two edges cross. Without recursion, as lines can be hundreds long.
 */
function giveRows(places, children, rankOf) {
  const free = []; // the next free row at each depth
  const open = [{ start: 0, least: 0 }];
  while (open.length) {
    const { start, least } = open.pop();
    const line = [start];
    for (let next = start; children[next].length; line.push(next)) {
      children[next].sort((a, b) => rankOf(b) - rankOf(a));
      next = children[next][0];
    }
    const row = Math.max(least, ...line.map((index) => free[places[index].depth] ?? 0));
    for (const index of line) {
      places[index].row = row;
      free[places[index].depth] = row + 1;
      for (const beside of children[index].slice(1).reverse()) open.push({ start: beside, least: row + 1 });
    }
  }
  return Math.max(...free);
}

function giveColumns(places) {
  const widths = [];
  for (const place of places) {
    place.width = labelWidth(place.label);
    widths[place.depth] = Math.max(widths[place.depth] ?? 0, place.width);
  }
  const lefts = [0];
  widths.forEach((width, depth) => lefts.push(lefts[depth] + width + GAP));
  for (const place of places) place.x = lefts[place.depth];
  return lefts.at(-1) - GAP;
}

function labelWidth(text) {
  let width = PADDING;
  for (const glyph of text) width += glyph.codePointAt(0) < 0x1100 || "…␣⏎⇥∅".includes(glyph) ? GLYPH : 2 * GLYPH;
  return Math.max(width, 30);
}
