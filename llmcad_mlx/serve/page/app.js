// The page: sends messages, streams answers, stops them. The parts that show things are imported.

import { Answer } from "./answer.js";
import { ServerError, listModels, streamChat } from "./client.js";
import { AnswerView, addQuestion, clearConversation } from "./conversation.js";
import { showFigures } from "./figures.js";
import { loadTurns, saveTurns } from "./kept.js";
import { ApiKey } from "./key.js";
import { RoundsView } from "./rounds.js";
import { requestFields, setUpSettings, showDefaults } from "./settings.js";

const SMALL = matchMedia("(max-width: 699px)");
const byId = (id) => document.getElementById(id);

const key = new ApiKey();
const rounds = new RoundsView((answer, index) => {
  for (const turn of turns) turn.view.showRound(turn.answer === answer ? index : null);
});

/**
 * @typedef {{question: string, element: Element, answer: Answer, view: AnswerView, note: string | null}} Turn
 * `note`: why the answer ended, "" for by itself, null before that
 */
/** @type {Turn[]} */
let turns = [];
let previous = []; // the turns before "New chat"
let model = "";
let sampling = {}; // of requests that ask for none
let leaving = false;
let running = null; // the AbortController of the answer being written

async function findModel() {
  try {
    const [first] = await listModels(key.value);
    model = first?.id ?? "";
    sampling = first?.sampling ?? {};
    showDefaults(sampling);
    byId("model").textContent = first?.draft ? `${model} · draft ${first.draft}` : model;
  } catch (error) {
    if (error.status === 401 && (await key.ask(error.message))) return findModel();
    showError(error.message);
  }
}

/** @param {Turn} [earlier]  the turn that this one is tried in place of */
async function send(question, earlier) {
  if (running || !question.trim()) return;
  showError("");
  const messages = conversation(question);
  const answer = new Answer();
  const turn = addTurn(question, answer);
  const { view } = turn;
  rounds.show(answer);
  save();
  setRunning(new AbortController());
  let problem = null;
  try {
    await receive(messages, answer, view, running.signal);
  } catch (error) {
    problem = error;
  } finally {
    setRunning(null);
  }
  if (turns.at(-1) === turn) await end(turn, problem, earlier);
}

/** @returns {Turn} */
function addTurn(question, answer, note = null) {
  const element = addQuestion(question);
  const view = new AnswerView(answer, key, {
    onToken: (round) => showRounds(answer, round),
    onRounds: () => showRounds(answer),
    onAgain: () => again(),
  });
  const turn = { question, element, answer, view, note };
  turns.push(turn);
  return turn;
}

/** Show turns of an earlier visit, or those before "New chat". A question without any answer goes where it is typed. */
function showTurns(kept) {
  for (const { question, answer, note } of kept) {
    if (answer.text) addTurn(question, answer, note);
    else byId("message").value ||= question;
  }
  if (turns.length) showFigures(turns.at(-1).answer.figures);
  fitMessage();
  save();
}

function finishShown() {
  for (const turn of turns) if (turn.note !== null) turn.view.finish(turn.note);
}

function save() {
  if (!leaving) saveTurns(turns, previous);
  byId("restore").hidden = !previous.length;
}

/** System prompt, all turns so far, the question. */
function conversation(question) {
  const { system } = requestFields();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    messages.push({ role: "user", content: turn.question }, { role: "assistant", content: turn.answer.text });
  }
  return [...messages, { role: "user", content: question }];
}

async function receive(messages, answer, view, signal) {
  const request = {
    model: model || undefined, // not known before the server has told it
    messages,
    stream: true,
    stream_options: { include_usage: true },
    speculation: { tokens: true, trees: true },
    ...requestFields().fields,
  };
  let due = 0; // chunks come faster than screens are drawn
  const draw = () => {
    due = 0;
    if (!turns.some((turn) => turn.answer === answer)) return; // a new conversation has begun
    view.update();
    rounds.grown(answer);
    showFigures(answer.figures);
  };
  try {
    for await (const chunk of streamChat(request, key.value, signal)) {
      answer.add(chunk);
      due ||= requestAnimationFrame(draw);
    }
  } finally {
    cancelAnimationFrame(due);
    draw();
  }
}

/** The answer is there, or was stopped, or failed. A question without any answer goes back to where it was typed. */
async function end(turn, problem, earlier) {
  const stopped = problem?.name === "AbortError";
  if (problem && !stopped && !(problem instanceof ServerError)) console.error(problem);
  if (problem && !turn.answer.text) {
    takeBack(turn);
    if (problem.status === 401 && (await key.ask(problem.message))) {
      byId("message").value = "";
      if (!model) await findModel();
      return send(turn.question, earlier);
    }
    if (earlier) bringBack(earlier);
  } else {
    turn.note = stopped ? "stopped" : problem ? "cut off" : ending(turn.answer, earlier?.answer.text);
    save();
    await turn.view.finish(turn.note);
  }
  if (problem && !stopped) showError(problem instanceof ServerError ? problem.message : `The page failed: ${problem.message}`);
}

function ending(answer, earlier) {
  const notes = answer.finishReason === "length" ? ["ended at the limit of tokens"] : [];
  if (answer.text === earlier) notes.push(whyTheSame());
  return notes.join(" · ");
}

function whyTheSame() {
  const { temperature = sampling.temperature, seed } = requestFields().fields;
  if (!temperature) return "the same answer, for the temperature is 0; Settings can raise it";
  return seed === undefined ? "the same answer again" : "the same answer, for the seed is fixed; Settings can clear it";
}

function takeBack(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.element.remove();
  turn.view.element.remove();
  rounds.clear();
  if (!turns.length) clearConversation();
  if (!byId("message").value) byId("message").value = turn.question;
  fitMessage();
  save();
}

/** Ask the last question once more. */
function again() {
  const turn = turns.at(-1);
  if (running || !turn) return;
  takeBack(turn);
  byId("message").value = "";
  fitMessage();
  send(turn.question, turn);
}

/** No other answer came: the earlier one stays. */
function bringBack({ question, answer, note }) {
  if (byId("message").value === question) byId("message").value = "";
  fitMessage();
  addTurn(question, answer, note).view.finish(note);
  save();
}

function showRounds(answer, index) {
  showTree(true);
  rounds.show(answer, index);
}

function newConversation() {
  if (running) turns.at(-1).note = "stopped";
  running?.abort();
  previous = turns.length ? turns : previous;
  turns = [];
  clearConversation();
  save();
  rounds.clear();
  showFigures({});
  showError("");
  byId("message").focus();
}

/** Undo "New chat". */
function restore() {
  const kept = previous;
  previous = [];
  clearConversation();
  showTurns(kept);
  finishShown();
  byId("message").focus();
}

function setRunning(controller) {
  const stopHadFocus = document.activeElement === byId("stop");
  running = controller;
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  if (stopHadFocus) byId("message").focus();
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

function showTree(shown) {
  document.body.classList.toggle("no-tree", !shown);
  byId("tree").setAttribute("aria-pressed", shown);
}

/** The message field is as high as its text, up to the limit of the style sheet. */
function fitMessage() {
  const field = byId("message");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

function submit() {
  if (running) return;
  const question = byId("message").value;
  byId("message").value = "";
  fitMessage();
  send(question);
}

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
byId("message").addEventListener("input", fitMessage);
byId("message").addEventListener("keydown", (event) => {
  // Enter that ends a composed character (Japanese, Chinese, Korean) does not send.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});
byId("stop").addEventListener("click", () => running?.abort());
byId("new").addEventListener("click", newConversation);
byId("restore").addEventListener("click", restore);
addEventListener("pagehide", () => {
  save(); // what comes after it is a connection that breaks, and no reason to take the question back
  leaving = true;
});
addEventListener("pageshow", () => (leaving = false));
byId("tint").addEventListener("click", () => {
  byId("tint").setAttribute("aria-pressed", document.body.classList.toggle("tint"));
});
byId("tree").addEventListener("click", () => showTree(document.body.classList.contains("no-tree")));
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => send(example.textContent));
}
// iPadOS lays its keyboard over the page instead of making it smaller.
visualViewport?.addEventListener("resize", () => {
  // In the page's own pixels: two fingers that zoom make the part that is seen smaller, and the page no shorter.
  const height = visualViewport.height * visualViewport.scale;
  document.documentElement.style.setProperty("--height", `${height}px`);
});

showTree(!SMALL.matches);
setUpSettings();
const kept = loadTurns();
previous = kept.previous;
showTurns(kept.turns);
findModel().finally(finishShown); // Markdown is rendered by the server, which may want a key
