// The conversation, and the one before it, kept in this browser: a reload loses nothing, and "New chat" can be undone.

import { Answer } from "./answer.js";

const STORED = "llmcad-mlx.conversation";

/** @typedef {{question: string, answer: Answer, note: string}} Turn  `note`: why the answer ended, "" for by itself */

/** @returns {{turns: Turn[], previous: Turn[]}}  as far as what is stored makes sense */
export function loadTurns() {
  let stored = null;
  try {
    stored = JSON.parse(localStorage.getItem(STORED));
  } catch {
    // storage is off, or somebody wrote into it
  }
  return { turns: read(stored?.turns), previous: read(stored?.previous) };
}

/**
 * @param {Turn[]} turns
 * @param {Turn[]} previous
 */
export function saveTurns(turns, previous) {
  const [now, before] = [written(turns), written(previous)];
  // Where there is little room, what matters least is left out: the earlier conversation, then which tokens were drafted.
  for (const kept of [{ turns: now, previous: before }, { turns: now }, { turns: now.map(withoutTokens) }]) {
    try {
      return localStorage.setItem(STORED, JSON.stringify(kept));
    } catch {
      // full, or off: the conversation lives as long as the page
    }
  }
}

function written(turns) {
  return turns.map(({ question, answer, note }) => ({ question, note: note ?? "cut off", answer: answer.saved() }));
}

function withoutTokens(turn) {
  return { ...turn, answer: { ...turn.answer, tokens: [] } };
}

function read(stored) {
  if (!Array.isArray(stored)) return [];
  const isTurn = (turn) => typeof turn?.question === "string" && typeof turn.answer?.text === "string";
  return stored.filter(isTurn).map(({ question, answer, note }) => {
    return { question, answer: Answer.from(answer), note: typeof note === "string" ? note : "" };
  });
}
