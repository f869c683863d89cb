// The rounds of one answer: which one is shown, and stepping through them.

import { drawTree, treeSummary } from "./tree.js";

const byId = (id) => document.getElementById(id);

export class RoundsView {
  /** @type {import("./answer.js").Answer | null} */
  #answer = null;
  #index = -1;
  #drawn = null; // the round on the canvas
  #following = true; // whether newer rounds take the place of the one shown
  #empty = byId("canvas").firstElementChild;
  #onChoice;

  /** @param {(answer: object, index: number | null) => void} onChoice  the round that was chosen; null: none, the newest is shown */
  constructor(onChoice) {
    this.#onChoice = onChoice;
    byId("earlier").addEventListener("click", () => this.#choose(this.#index - 1));
    byId("later").addEventListener("click", () => this.#choose(this.#index + 1));
    byId("round").addEventListener("input", () => this.#choose(Number(byId("round").value) - 1));
  }

  /** Show an answer's round; without `index` its newest, and the ones to come as they arrive. */
  show(answer, index) {
    this.#answer = answer;
    if (index !== undefined) return this.#choose(index);
    this.#index = answer.rounds.length - 1;
    this.#following = true;
    this.#draw();
    this.#onChoice(answer, null);
  }

  /** An answer has grown: draw its newest round, unless an earlier one or another answer is looked at. */
  grown(answer) {
    if (answer !== this.#answer) return;
    const newest = answer.rounds.length - 1;
    if (this.#following) this.#index = newest;
    this.#draw();
  }

  /** Back to nothing. */
  clear() {
    this.#answer = null;
    this.#index = -1;
    this.#following = true;
    this.#draw();
  }

  #choose(index) {
    const newest = this.#answer.rounds.length - 1;
    this.#index = Math.min(Math.max(index, 0), newest);
    this.#following = this.#index === newest;
    this.#draw();
    this.#onChoice(this.#answer, this.#index);
  }

  #draw() {
    const count = this.#answer?.rounds.length ?? 0;
    const slider = byId("round");
    slider.max = Math.max(count, 1);
    slider.value = this.#index + 1;
    slider.disabled = count < 2;
    byId("earlier").disabled = this.#index < 1;
    byId("later").disabled = this.#index >= count - 1;
    byId("place").textContent = count ? `round ${this.#index + 1} of ${count}` : "no rounds yet";
    const round = this.#answer?.rounds[this.#index] ?? null;
    if (round === this.#drawn) return;
    this.#drawn = round;
    const describe = (text) => (byId("node").textContent = text || (round ? treeSummary(round) : ""));
    const canvas = byId("canvas");
    canvas.replaceChildren(round ? drawTree(round, canvas.clientWidth, describe) : this.#empty);
    canvas.scrollTo(0, 0);
    describe("");
  }
}
