// The conversation as it is shown: questions, answers, what an answer says about itself.

import { summary } from "./figures.js";
import { Rendering } from "./markdown.js";

const NEAR = 60; // px from the end within which the view goes along with new text
const byId = (id) => document.getElementById(id);
const log = byId("log");

/** Show what the user said. Returns its element. */
export function addQuestion(text) {
  const element = make("div", "question");
  element.textContent = text;
  append(element);
  log.scrollTop = log.scrollHeight;
  return element;
}

/** Remove everything; the welcome is back. */
export function clearConversation() {
  for (const element of log.querySelectorAll(".question, .answer")) element.remove();
  byId("welcome").hidden = false;
  byId("speaker").textContent = "";
}

/** One answer on the page. */
export class AnswerView {
  #answer;
  #rendering;
  #spoken = 0; // sections that the screen reader has been given
  #shownRound = null;

  /**
   * @param {import("./answer.js").Answer} answer
   * @param {{value: string}} key  the API key
   * @param {{onToken: (round: number) => void, onRounds: () => void, onAgain: () => void}} actions
   */
  constructor(answer, key, actions) {
    this.#answer = answer;
    this.element = make("article", "answer");
    this.element.setAttribute("aria-label", "Answer");
    this.element.setAttribute("aria-busy", "true");
    this.text = make("div", "text");
    this.state = make("p", "state waiting");
    this.state.textContent = "Reading the prompt";
    this.element.append(this.text, this.state);
    this.actions = actions;
    this.#rendering = new Rendering(this.text, answer, key, (change) => this.#grow(change));
    this.text.addEventListener("click", (event) => {
      const round = event.target.closest(".token")?.dataset.round;
      if (round !== undefined && getSelection().isCollapsed) actions.onToken(Number(round));
    });
    append(this.element);
    log.scrollTop = log.scrollHeight;
  }

  /** Show the text so far. */
  update() {
    this.#rendering.update();
  }

  #grow(change) {
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
    change();
    this.#markRound();
    this.state.hidden = this.#answer.text !== "";
    this.#speak(this.text.children.length - 1); // the last one may still grow
    if (follows) log.scrollTop = log.scrollHeight;
  }

  /** Nothing more comes. `note` says why, when it is not simply the end. */
  async finish(note) {
    await this.#rendering.flush();
    this.element.setAttribute("aria-busy", "false");
    this.#speak(this.text.children.length);
    this.state.className = "state";
    this.state.hidden = false;
    this.state.textContent = [summary(this.#answer), note].filter(Boolean).join(" · ");
    this.element.append(this.#buttons());
    if (log.scrollHeight - log.scrollTop - log.clientHeight < 2 * NEAR) log.scrollTop = log.scrollHeight;
  }

  /** Mark the tokens of one round; null: none. */
  showRound(index) {
    this.#shownRound = index;
    this.#markRound();
    if (index !== null) this.text.querySelector(".of-round")?.scrollIntoView({ block: "nearest" });
  }

  #markRound() {
    const shown = this.#shownRound === null ? "" : String(this.#shownRound);
    for (const token of this.text.querySelectorAll(".of-round")) {
      if (token.dataset.round !== shown) token.classList.remove("of-round");
    }
    if (!shown) return;
    for (const token of this.text.querySelectorAll(`[data-round="${shown}"]`)) token.classList.add("of-round");
  }

  #speak(end) {
    const sections = [...this.text.children].slice(this.#spoken, end);
    if (!sections.length) return;
    this.#spoken = end;
    byId("speaker").textContent = sections.map((section) => section.textContent).join("\n");
  }

  #buttons() {
    const bar = make("div", "actions");
    // Browsers give pages without https no clipboard, except on this machine itself.
    if (navigator.clipboard) bar.append(button("Copy", (self) => copy(this.#answer.text, self)));
    if (this.#answer.rounds.length) bar.append(button("Show trees", this.actions.onRounds));
    const again = button("Try again", this.actions.onAgain);
    again.classList.add("again");
    bar.append(again);
    return bar;
  }
}

function append(element) {
  byId("welcome").hidden = true;
  log.append(element);
}

async function copy(text, self) {
  const done = await navigator.clipboard.writeText(text).then(() => "Copied", () => "Not allowed");
  self.textContent = done;
  setTimeout(() => (self.textContent = "Copy"), 1500);
}

function button(text, act) {
  const element = make("button", "quiet small");
  element.type = "button";
  element.textContent = text;
  element.addEventListener("click", () => act(element));
  return element;
}

function make(tag, classes) {
  const element = document.createElement(tag);
  element.className = classes;
  return element;
}
