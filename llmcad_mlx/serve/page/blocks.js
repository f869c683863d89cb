// Markdown's blocks: paragraphs, headings, lists, quotes, code fences, rules. Only offsets, no document.

/**
 * @typedef {{from: number, to: number}} Line  a slice of the source, indentation and markers of its parents left out
 * @typedef {object} Block
 * @property {"paragraph"|"heading"|"code"|"quote"|"list"|"item"|"rule"} kind
 * @property {Line[]} lines  the text of paragraph, heading and code
 * @property {Block[]} blocks  what quote, list and item hold
 * @property {number} level  of a heading
 * @property {string} language  of a fence
 * @property {number | null} first  number of the first item; null: bullets
 */

const DEEPEST = 12; // quotes and lists within each other; below, everything is a paragraph
const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+/;
const RULE = /^ {0,3}(?:(?:\* *){3,}|(?:- *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const MARKER = /^( *)(?:[-*+]|(\d{1,9})[.)])(?: {1,4}|$)/;

/** Lines of `source` from `start`. */
export function sourceLines(source, start = 0) {
  const lines = [];
  for (let from = start; from <= source.length; ) {
    const next = source.indexOf("\n", from);
    const to = next < 0 ? source.length : next;
    lines.push({ from, to });
    from = to + 1;
  }
  return lines;
}

/**
 * @param {string} source
 * @param {Line[]} lines
 * @returns {Block[]}
 */
export function parseBlocks(source, lines, depth = 0) {
  const text = lines.map(({ from, to }) => source.slice(from, to));
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const read = depth < DEEPEST ? reader(text[at]) : readParagraph;
    const [block, next] = text[at].trim() ? read(source, lines, text, at, depth) : [null, at + 1];
    if (block) blocks.push(block);
    at = next;
  }
  return blocks;
}

function reader(line) {
  if (FENCE.test(line)) return readCode;
  if (HEADING.test(line)) return readHeading;
  if (RULE.test(line)) return readRule;
  if (QUOTE.test(line)) return readQuote;
  return MARKER.test(line) ? readList : readParagraph;
}

function readParagraph(source, lines, text, at, depth) {
  let end = at + 1;
  while (end < lines.length && text[end].trim() && (depth >= DEEPEST || reader(text[end]) === readParagraph)) end++;
  const kept = lines.slice(at, end).map((line, index) => trimmed(line, text[at + index]));
  return [{ kind: "paragraph", lines: kept }, end];
}

function readHeading(source, lines, text, at) {
  const [marker, hashes] = HEADING.exec(text[at]);
  const line = { from: lines[at].from + marker.length, to: lines[at].to };
  return [{ kind: "heading", level: hashes.length, lines: [line] }, at + 1];
}

function readRule(source, lines, text, at) {
  return [{ kind: "rule", lines: [] }, at + 1];
}

function readCode(source, lines, text, at) {
  const [, fence, info] = FENCE.exec(text[at]);
  const language = info.trim().split(" ")[0];
  const indent = /^ */.exec(text[at])[0].length;
  let end = at + 1;
  while (end < lines.length && !closesFence(text[end].trim(), fence)) end++;
  const body = lines.slice(at + 1, end).map((line, index) => {
    const drop = Math.min(indent, /^ */.exec(text[at + 1 + index])[0].length);
    return { from: line.from + drop, to: line.to };
  });
  return [{ kind: "code", language, lines: body }, end + 1];
}

function closesFence(line, fence) {
  return line.length >= fence.length && line === fence[0].repeat(line.length);
}

function readQuote(source, lines, text, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(text[end])) end++;
  const inside = lines.slice(at, end).map((line, index) => {
    return { from: line.from + QUOTE.exec(text[at + index])[0].length, to: line.to };
  });
  return [{ kind: "quote", blocks: parseBlocks(source, inside, depth + 1) }, end];
}

function readList(source, lines, text, at, depth) {
  const [, indent, number] = MARKER.exec(text[at]);
  const list = { kind: "list", first: number === undefined ? null : Number(number), blocks: [] };
  while (at < lines.length && continuesList(text[at], indent.length, number !== undefined)) {
    const end = itemEnd(text, at, indent.length);
    list.blocks.push({ kind: "item", blocks: parseBlocks(source, itemLines(lines, text, at, end), depth + 1) });
    at = end;
    const filled = skipBlank(text, at);
    if (filled < lines.length && continuesList(text[filled], indent.length, number !== undefined)) at = filled;
  }
  return [list, at];
}

function continuesList(line, indent, numbered) {
  const marker = RULE.test(line) ? null : MARKER.exec(line);
  return marker !== null && marker[1].length <= indent + 1 && (marker[2] !== undefined) === numbered;
}

/** An item goes on over deeper lines, also after blank ones, and over text that simply goes on. */
function itemEnd(text, at, indent) {
  let end = at + 1;
  while (end < text.length) {
    const filled = skipBlank(text, end);
    if (filled === text.length) return end;
    const deeper = /^ */.exec(text[filled])[0].length > indent + 1;
    const goesOn = filled === end && reader(text[filled]) === readParagraph;
    if (!deeper && !goesOn) return end;
    end = filled + 1;
  }
  return end;
}

function itemLines(lines, text, at, end) {
  const marker = MARKER.exec(text[at])[0].length;
  return lines.slice(at, end).map((line, index) => {
    const drop = index ? Math.min(marker, /^ */.exec(text[at + index])[0].length) : marker;
    return { from: line.from + drop, to: line.to };
  });
}

function skipBlank(text, at) {
  while (at < text.length && !text[at].trim()) at++;
  return at;
}

function trimmed(line, text) {
  return { from: line.from + text.length - text.trimStart().length, to: line.to - (text.length - text.trimEnd().length) };
}
