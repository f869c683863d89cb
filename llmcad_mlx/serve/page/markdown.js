// An answer's Markdown as the server renders it, block by block; the tokens are marked here.

import { renderMarkdown } from "./client.js";

// Between two renderings pass at least so many ms, and so many times what the last one took: the server, which has
// an answer to write, gives a few per cent of its time to this.
const PAUSE = 100;
const TIMES = 15;

/** @typedef {import("./answer.js").Answer} Answer */

export class Rendering {
  #container;
  #answer;
  #key;
  #around;
  #first = 0; // the first block that may still change, and where its source begins
  #from = 0;
  #shown = []; // for each block, what it was made from
  #stale = false;
  #hurried = false;
  #wake = () => {};
  #running = null;

  /**
   * @param {Element} container  gets an element for each block
   * @param {Answer} answer  its text only grows
   * @param {{value: string}} key
   * @param {(change: () => void) => void} around  makes each change of the container, and what goes with it
   */
  constructor(container, answer, key, around) {
    this.#container = container;
    this.#answer = answer;
    this.#key = key;
    this.#around = around;
  }

  /** Show the text so far, soon. */
  update() {
    this.#stale = true;
    this.#running ??= this.#run();
  }

  /** Show the text so far, now. Resolves when that is done. */
  async flush() {
    this.#hurried = true;
    this.#wake();
    this.update();
    await this.#running;
    this.#hurried = false;
  }

  async #run() {
    while (this.#stale) {
      this.#stale = false;
      const begun = performance.now();
      await this.#draw();
      const pause = Math.max(PAUSE, TIMES * (performance.now() - begun));
      if (this.#hurried) continue;
      await new Promise((resolve) => {
        this.#wake = resolve;
        setTimeout(resolve, pause);
      });
    }
    this.#running = null;
  }

  async #draw() {
    const text = this.#answer.text.slice(this.#from);
    if (!text) return;
    const rendered = await renderMarkdown(text, this.#key.value).catch(() => null);
    const blocks = rendered ?? [{ length: text.length, html: null }]; // better plain than not at all
    this.#around(() => this.#showAll(blocks));
    // The last line, unfinished as it is, may look like a block of its own and turn out to belong to the one before.
    for (const { length } of blocks.slice(0, -2)) {
      this.#first += 1;
      this.#from += length;
    }
  }

  #showAll(blocks) {
    let from = this.#from;
    blocks.forEach(({ length, html }, index) => {
      this.#show(this.#first + index, from, this.#answer.text.slice(from, from + length), html);
      from += length;
    });
    while (this.#container.children.length > this.#first + blocks.length) this.#container.lastElementChild.remove();
  }

  #show(index, from, source, html) {
    const made = JSON.stringify([source, html]);
    const old = this.#container.children[index];
    if (old && this.#shown[index] === made) return;
    const element = html === null ? plain(source) : parsed(html);
    markTokens(element, this.#answer.tokens, from, source);
    if (old) old.replaceWith(element);
    else this.#container.append(element);
    this.#shown[index] = made;
  }
}

function plain(source) {
  const element = document.createElement("p");
  element.textContent = source;
  return element;
}

/** The server's HTML holds no script and no style of the model's; a document of its own would not run one. */
function parsed(html) {
  return new DOMParser().parseFromString(html, "text/html").body.firstElementChild;
}

/** Put each token's share of an element's text into a span. The text is `source` without its markers, in order. */
function markTokens(element, tokens, from, source) {
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  const nodes = [];
  while (walker.nextNode()) nodes.push(walker.currentNode);
  let at = 0; // in the source: what is before has been found
  for (const node of nodes) {
    const whole = source.indexOf(node.data, at);
    const spans = [];
    let begin = 0;
    let owner;
    for (let index = 0; index < node.length; index++) {
      const found = whole < 0 ? find(source, node.data[index], at) : whole + index;
      if (found >= 0) at = found + 1;
      const token = tokenAt(tokens, from + Math.max(at - 1, 0));
      if (index && token !== owner) {
        spans.push(tokenSpan(owner, node.data.slice(begin, index)));
        begin = index;
      }
      owner = token;
    }
    node.replaceWith(...spans, tokenSpan(owner, node.data.slice(begin)));
  }
}

function find(source, letter, at) {
  if (/\s/.test(letter)) while (at < source.length && !/\s/.test(source[at])) at++;
  else at = source.indexOf(letter, at);
  return at < source.length ? at : -1;
}

function tokenSpan(token, text) {
  const span = document.createElement("span");
  span.textContent = text;
  span.className = token?.drafted ? "token drafted" : "token";
  if (token?.round >= 0) span.dataset.round = token.round;
  return span;
}

/** The token that a place in the text belongs to: the first one that ends behind it. */
function tokenAt(tokens, place) {
  let low = 0;
  let high = tokens.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (tokens[middle].end > place) high = middle;
    else low = middle + 1;
  }
  return tokens[low];
}
