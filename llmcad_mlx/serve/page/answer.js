// One answer as it arrives: its text, where each token ends, and the rounds that made it.

/**
 * @typedef {{end: number, drafted: boolean, round: number}} Token  `end`: offset in the text; `round`: its index
 * @typedef {{id: number, text: string, parent: number, confidence: number, source: string, state: string}} TreeNode
 * @typedef {{nodes: TreeNode[], bonus: {id: number, text: string} | null}} Round
 */

export class Answer {
  text = "";
  /** @type {Token[]} */
  tokens = [];
  /** @type {Round[]} */
  rounds = [];
  finishReason = null;
  /** The server's closing figures (`usage.speculation`), or what the rounds said so far. */
  figures = {};
  numTokens = 0;
  #accepted = 0;
  #pathTested = 0;
  #hasTokens = false;
  #lastKind = "";

  /** What is kept of it between visits: without rounds, which are many times its size. */
  saved() {
    const { text, finishReason, figures, numTokens } = this;
    return { text, finishReason, figures, numTokens, tokens: this.tokens.map(({ end, drafted }) => [end, drafted]) };
  }

  /** The answer that `saved` was made of. `saved.text` is a string; what else makes no sense is left out. */
  static from({ text, finishReason, figures, numTokens, tokens }) {
    const answer = new Answer();
    answer.text = text;
    answer.finishReason = finishReason ?? null;
    if (typeof figures === "object") answer.figures = { ...figures };
    if (Number.isInteger(numTokens)) answer.numTokens = numTokens;
    const places = Array.isArray(tokens) ? tokens.filter((token) => Number.isInteger(token?.[0])) : [];
    answer.tokens = places.map(([end, drafted]) => ({ end, drafted: drafted === true, round: -1 }));
    return answer;
  }

  /** Take one chunk of the stream. */
  add(chunk) {
    const { round, tokens } = chunk.speculation ?? {};
    if (isRound(round)) this.#addRound(round);
    const choice = chunk.choices?.[0];
    const piece = this.#written(choice?.delta, Array.isArray(tokens) ? tokens : []);
    if (piece) this.#addText(piece, Array.isArray(tokens) ? tokens : []);
    this.finishReason = choice?.finish_reason ?? this.finishReason;
    if (chunk.usage) {
      this.numTokens = chunk.usage.completion_tokens ?? this.numTokens;
      this.figures = { ...this.figures, ...chunk.usage.speculation };
      if (this.figures.tested === 0) delete this.figures.acceptance_rate; // 0 of 0 is no share
    }
  }

  /** What a chunk adds, as the model wrote it: the server takes thinking out of the text, but not out of its tokens. */
  #written(delta, tokens) {
    this.#hasTokens ||= tokens.length > 0;
    if (this.#hasTokens) return tokens.map((token) => token.text).join("");
    let piece = "";
    for (const kind of ["reasoning", "content"]) {
      const said = delta?.[kind];
      if (!said) continue;
      if (this.#lastKind && kind !== this.#lastKind) piece += "\n\n"; // what stood between them is not told
      this.#lastKind = kind;
      piece += said;
    }
    return piece;
  }

  /** Tokens' texts are cut out of the piece in order; text that no token claims becomes a token of its own. */
  #addText(piece, tokens) {
    const round = this.rounds.length - 1;
    let at = this.text.length;
    this.text += piece;
    for (const token of tokens) {
      if (!token.text || !this.text.startsWith(token.text, at)) continue;
      at += token.text.length;
      this.tokens.push({ end: at, drafted: token.from_draft === true, round });
    }
    if (at < this.text.length) {
      const drafted = tokens.length > 0 && tokens.every((token) => token.from_draft === true);
      this.tokens.push({ end: this.text.length, drafted, round });
    }
    this.numTokens += Math.max(tokens.length, 1);
  }

  #addRound(round) {
    this.rounds.push(round);
    const accepted = round.nodes.filter((node) => node.state === "accepted").length;
    const last = round.nodes.findLastIndex((node) => node.state === "accepted" || node.state === "root");
    const missed = round.nodes.some((node) => node.parent === last && node.state === "rejected");
    this.#accepted += accepted;
    this.#pathTested += accepted + (missed ? 1 : 0); // what the target's own path came to
    this.figures = {
      tokens_per_s: round.tokens_per_s,
      tokens_per_pass: round.tokens_per_pass,
      acceptance_rate: this.#pathTested ? this.#accepted / this.#pathTested : undefined,
      peak_rss_bytes: round.peak_rss_bytes,
      budget_bytes: round.budget_bytes,
    };
  }
}

/** Whether a round can be drawn: nodes with parents before them. */
function isRound(round) {
  if (!Array.isArray(round?.nodes) || !round.nodes.length) return false;
  return round.nodes.every(
    ({ parent, text }, index) =>
      typeof text === "string" && Number.isInteger(parent) && parent < index && parent >= (index ? 0 : -1),
  );
}
