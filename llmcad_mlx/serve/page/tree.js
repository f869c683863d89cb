// The token tree of one round as SVG, operable by pointer, touch and arrow keys.

import { percent } from "./figures.js";
import { layOut } from "./layout.js";

const SVG = "http://www.w3.org/2000/svg";
const NODE = 24; // px, height of a node
const ROW = { fine: 32, coarse: 46 }; // px: rows that a finger can hit are higher
const MARGIN = 12; // px
const SMALLEST = 0.75; // share of its size down to which a tree is made to fit
const STATES = { root: "start", accepted: "accepted", rejected: "rejected", provisional: "drafted, not sent" };

/**
 * @param {import("./answer.js").Round} round
 * @param {number} room  px that are free; a tree that needs somewhat more is drawn smaller, where a mouse points
 * @param {(text: string) => void} describe  shows what a node is, "" for nothing
 * @returns {SVGElement}
 */
export function drawTree(round, room, describe) {
  const { places, rows, width, end } = layOut(round);
  const coarse = matchMedia("(pointer: coarse)").matches;
  const row = coarse ? ROW.coarse : ROW.fine;
  const [wide, high] = [width + 2 * MARGIN, rows * row + MARGIN];
  const scale = coarse ? 1 : Math.min(1, Math.max(SMALLEST, room / wide));
  const svg = make("svg", { width: wide * scale, height: high * scale, viewBox: `0 0 ${wide} ${high}`, role: "tree" });
  svg.setAttribute("aria-label", treeSummary(round));
  const edges = make("g", { "aria-hidden": "true" });
  svg.append(edges);
  const place = ({ x, row: at, width }) => ({ left: x + MARGIN, right: x + width + MARGIN, y: at * row + row / 2 });
  round.nodes.forEach((node, index) => {
    if (index) edges.append(drawEdge(place(places[node.parent]), place(places[index]), node.state, node.confidence));
    svg.append(drawNode(place(places[index]), places[index], node.state, row, nodeText(node, places[index])));
    svg.lastElementChild.dataset.node = index;
    svg.lastElementChild.dataset.parent = node.parent;
  });
  if (round.bonus) {
    const at = places.at(-1);
    edges.append(drawEdge(place(places[end]), place(at), "bonus", 1));
    svg.append(drawNode(place(at), at, "bonus", row, `${quoted(round.bonus.text)}: the target’s own token`));
    svg.lastElementChild.dataset.parent = end;
  }
  svg.querySelector("[role=treeitem]").setAttribute("tabindex", "0");
  operate(svg, describe);
  return svg;
}

/** "16 nodes: the start, 4 accepted, 10 rejected, 1 not sent". */
export function treeSummary({ nodes }) {
  const count = (state) => nodes.filter((node) => node.state === state).length;
  const parts = ["the start", `${count("accepted")} accepted`, `${count("rejected")} rejected`];
  if (count("provisional")) parts.push(`${count("provisional")} not sent`);
  return `${nodes.length} ${nodes.length === 1 ? "node" : "nodes"}: ${parts.join(", ")}`;
}

function nodeText(node, { depth, reach }) {
  if (!depth) return `${quoted(node.text)}: the last token before this round`;
  const along = depth > 1 ? `, ${percent(reach)} along its branch` : "";
  return `${quoted(node.text)}: ${STATES[node.state] ?? node.state}, confidence ${percent(node.confidence)}${along}, drafted by ${drafter(node.source)}`;
}

function drafter(source) {
  return { model: "the draft model", ngram: "prompt lookup", table: "the n-gram table" }[source] ?? source;
}

function quoted(text) {
  return JSON.stringify(text).replace(/^"|"$/g, (_, at) => (at ? "”" : "“"));
}

function drawEdge(from, to, state, confidence) {
  const middle = (from.right + to.left) / 2;
  const d = `M${from.right} ${from.y}C${middle} ${from.y} ${middle} ${to.y} ${to.left} ${to.y}`;
  return make("path", { class: `edge ${state}`, d, "stroke-opacity": 0.35 + 0.65 * share(confidence) });
}

function drawNode({ left, y }, { width, label, depth }, state, row, text) {
  const group = make("g", { class: `tree-node ${state}`, role: "treeitem", tabindex: "-1", "aria-level": depth + 1 });
  group.setAttribute("aria-label", text);
  // What a finger hits is as high as the row; what is seen is not.
  group.append(make("rect", { class: "reach", x: left - 4, y: y - row / 2, width: width + 8, height: row }));
  group.append(make("rect", { class: "body", x: left, y: y - NODE / 2, width, height: NODE, rx: 6 }));
  const name = make("text", { x: left + width / 2, y: y + 4, "text-anchor": "middle" });
  name.textContent = label;
  group.append(name);
  return group;
}

/** Pointer, touch and keyboard all end in `describe`. One tab stop; arrows go along branches and across them. */
function operate(svg, describe) {
  const items = [...svg.querySelectorAll("[role=treeitem]")];
  const choose = (item) => {
    for (const other of items) other.classList.toggle("chosen", other === item);
    describe(item?.getAttribute("aria-label") ?? "");
  };
  svg.addEventListener("pointerover", (event) => {
    const item = event.target.closest("[role=treeitem]");
    if (item) choose(item);
  });
  svg.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") choose(svg.querySelector("[role=treeitem]:focus"));
  });
  svg.addEventListener("click", (event) => choose(event.target.closest("[role=treeitem]")));
  svg.addEventListener("focusin", (event) => {
    for (const item of items) item.setAttribute("tabindex", item === event.target ? "0" : "-1");
    choose(event.target);
  });
  svg.addEventListener("keydown", (event) => {
    const next = neighbour(items, event.target, event.key);
    if (next === undefined) return;
    event.preventDefault();
    next?.focus();
  });
}

/** The item an arrow key leads to; null at an end, undefined for another key. */
function neighbour(items, item, key) {
  const index = item.dataset.node;
  const top = (other) => Number(other.querySelector(".body").getAttribute("y"));
  const level = item.getAttribute("aria-level");
  const column = items.filter((other) => other.getAttribute("aria-level") === level).sort((a, b) => top(a) - top(b));
  switch (key) {
    case "ArrowLeft":
      return items.find((other) => other.dataset.node === item.dataset.parent) ?? null;
    case "ArrowRight":
      return items.filter((other) => index && other.dataset.parent === index).sort((a, b) => top(a) - top(b))[0] ?? null;
    case "ArrowUp":
      return column[column.indexOf(item) - 1] ?? null;
    case "ArrowDown":
      return column[column.indexOf(item) + 1] ?? null;
    default:
      return undefined;
  }
}

function share(value) {
  return Number.isFinite(value) ? Math.min(1, Math.max(0, value)) : 0;
}

function make(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}
