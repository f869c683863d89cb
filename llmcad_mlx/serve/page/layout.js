// Where the nodes of a token tree go: depth from left to right, a row for each branch.

const GLYPH = 7.3; // px, of the 12 px monospaced label; most scripts beyond Latin, Greek and Cyrillic are twice as wide
const PADDING = 18; // px, both sides of a label
const GAP = 26; // px between columns, where the edges are
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

/** Depth first, without recursion: a branch can be hundreds of nodes deep. */
function giveRows(places, children, rankOf) {
  let rows = 0;
  const open = [0];
  while (open.length) {
    const index = open.pop();
    places[index].row = rows;
    const below = children[index].sort((a, b) => rankOf(b) - rankOf(a));
    if (below.length) open.push(...below.toReversed());
    else rows++;
  }
  return rows;
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
