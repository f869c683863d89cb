// An answer's Markdown as document nodes. Model text only ever becomes text nodes: no markup of it is interpreted.

import { parseBlocks, sourceLines } from "./blocks.js";
import { appendInline } from "./inline.js";

/** What each finished top-level element was made from: kind and where its text is. */
const made = new WeakMap();

/**
 * Make `container` show `answer`. Text only grows, so of the elements only the last changes, and more come.
 * @param {Element} container
 * @param {import("./answer.js").Answer} answer
 */
export function renderAnswer(container, answer) {
  const blocks = parseBlocks(answer.text, sourceLines(answer.text));
  const emit = tokenEmitter(answer);
  blocks.forEach((block, index) => {
    const key = `${block.kind} ${extent(block)}`;
    const old = container.children[index];
    if (old && made.get(old) === key) return;
    const element = build(block, answer.text, emit);
    if (index + 1 < blocks.length) made.set(element, key);
    if (old) old.replaceWith(element);
    else container.append(element);
  });
  while (container.children.length > blocks.length) container.lastElementChild.remove();
}

/** First and last source offset of all text in a block, and how much of it is there. */
function extent(block) {
  const lines = [...allLines(block)];
  return [lines[0]?.from ?? 0, lines.at(-1)?.to ?? 0, lines.length];
}

function* allLines(block) {
  yield* block.lines ?? [];
  for (const inner of block.blocks ?? []) yield* allLines(inner);
}

function build(block, source, emit) {
  switch (block.kind) {
    case "code":
      return buildCode(block, source, emit);
    case "rule":
      return document.createElement("hr");
    case "heading":
      // The page's own headings are h1 and h2.
      return buildText(`h${Math.min(block.level + 2, 6)}`, block, source, emit);
    case "paragraph":
      return buildText("p", block, source, emit);
    default: {
      const tag = { quote: "blockquote", item: "li", list: block.first === null ? "ul" : "ol" }[block.kind];
      const element = document.createElement(tag);
      if (tag === "ol" && block.first !== 1) element.start = block.first;
      element.append(...block.blocks.map((inner) => build(inner, source, emit)));
      return element;
    }
  }
}

function buildText(tag, block, source, emit) {
  const element = document.createElement(tag);
  const { text, emitLocal } = joined(block.lines, source, emit);
  appendInline(element, text, emitLocal);
  return element;
}

function buildCode(block, source, emit) {
  const pre = document.createElement("pre");
  pre.tabIndex = 0; // it scrolls sideways
  const code = document.createElement("code");
  if (block.language) pre.dataset.language = block.language;
  const { text, emitLocal } = joined(block.lines, source, emit);
  emitLocal(code, 0, text.length);
  pre.append(code);
  return pre;
}

/** The lines as one text, and an `emit` for its offsets that finds the tokens of the source below them. */
function joined(lines, source, emit) {
  const starts = []; // of each line in the joined text
  let text = "";
  for (const { from, to } of lines) {
    starts.push(text.length);
    text += `${source.slice(from, to)}\n`;
  }
  text = text.slice(0, -1);
  const emitLocal = (parent, from, to) => {
    for (let index = firstWhere(starts, (start) => start > from) - 1; starts[index] < to; index++) {
      const shift = lines[index].from - starts[index];
      const low = Math.max(from, starts[index]) + shift;
      const high = Math.min(to, starts[index + 1] ?? text.length) + shift;
      const end = Math.min(high, lines[index].to);
      if (low < end) emit(parent, low, end);
      if (high > lines[index].to) parent.append("\n");
    }
  };
  return { text, emitLocal };
}

/** Appends a slice of the answer, a span for each token. */
function tokenEmitter(answer) {
  return (parent, from, to) => {
    let index = firstWhere(answer.tokens, (token) => token.end > from);
    while (from < to) {
      const token = answer.tokens[index++];
      const end = Math.min(token.end, to);
      const span = document.createElement("span");
      span.textContent = answer.text.slice(from, end);
      span.className = token.drafted ? "token drafted" : "token";
      if (token.round >= 0) span.dataset.round = token.round;
      parent.append(span);
      from = end;
    }
  };
}

/** Index of the first entry that passes, where all after it do too; the length when none does. */
function firstWhere(entries, passes) {
  let low = 0;
  let high = entries.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (passes(entries[middle])) high = middle;
    else low = middle + 1;
  }
  return low;
}
