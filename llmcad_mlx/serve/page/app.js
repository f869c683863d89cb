// The page: sends messages, streams answers, stops them. The parts that show things are imported.

import { Answer } from "./answer.js";
import { ServerError, listModels, streamChat } from "./client.js";
import { AnswerView, addQuestion, clearConversation } from "./conversation.js";
import { showFigures } from "./figures.js";
import { ApiKey } from "./key.js";
import { RoundsView } from "./rounds.js";
import { requestFields, setUpSettings } from "./settings.js";

const SMALL = matchMedia("(max-width: 699px)");
const byId = (id) => document.getElementById(id);

const key = new ApiKey();
const rounds = new RoundsView((answer, index) => {
  for (const turn of turns) turn.view.showRound(turn.answer === answer ? index : null);
});

/** @type {{question: string, element: Element, answer: Answer, view: AnswerView}[]} */
let turns = [];
let model = "";
let running = null; // the AbortController of the answer being written

async function findModel() {
  try {
    const [first] = await listModels(key.value);
    model = first?.id ?? "";
    byId("model").textContent = first?.draft ? `${model} · draft ${first.draft}` : model;
  } catch (error) {
    if (error.status === 401 && (await key.ask(error.message))) return findModel();
    showError(error.message);
  }
}

async function send(question) {
  if (running || !question.trim()) return;
  showError("");
  const messages = conversation(question);
  const answer = new Answer();
  const element = addQuestion(question);
  const view = new AnswerView(answer, key, {
    onToken: (round) => showRounds(answer, round),
    onRounds: () => showRounds(answer),
    onAgain: () => again(),
  });
  const turn = { question, element, answer, view };
  turns.push(turn);
  rounds.show(answer);
  setRunning(new AbortController());
  let problem = null;
  try {
    await receive(messages, answer, view, running.signal);
  } catch (error) {
    problem = error;
  } finally {
    setRunning(null);
  }
  if (turns.at(-1) === turn) await end(turn, problem);
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
async function end(turn, problem) {
  const stopped = problem?.name === "AbortError";
  if (problem && !stopped && !(problem instanceof ServerError)) console.error(problem);
  if (problem && !turn.answer.text) {
    takeBack(turn);
    if (problem.status === 401 && (await key.ask(problem.message))) {
      byId("message").value = "";
      if (!model) await findModel();
      return send(turn.question);
    }
  } else {
    await turn.view.finish(stopped ? "stopped" : problem ? "cut off" : ending(turn.answer));
  }
  if (problem && !stopped) showError(problem instanceof ServerError ? problem.message : `The page failed: ${problem.message}`);
}

function ending(answer) {
  return answer.finishReason === "length" ? "ended at the limit of tokens" : "";
}

function takeBack(turn) {
  turns = turns.filter((other) => other !== turn);
  turn.element.remove();
  turn.view.element.remove();
  rounds.clear();
  if (!turns.length) clearConversation();
  if (!byId("message").value) byId("message").value = turn.question;
  fitMessage();
}

/** Ask the last question once more. */
function again() {
  const turn = turns.at(-1);
  if (running || !turn) return;
  takeBack(turn);
  byId("message").value = "";
  fitMessage();
  send(turn.question);
}

function showRounds(answer, index) {
  showTree(true);
  rounds.show(answer, index);
}

function newConversation() {
  running?.abort();
  turns = [];
  clearConversation();
  rounds.clear();
  showFigures({});
  showError("");
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
byId("tint").addEventListener("click", () => {
  byId("tint").setAttribute("aria-pressed", document.body.classList.toggle("tint"));
});
byId("tree").addEventListener("click", () => showTree(document.body.classList.contains("no-tree")));
for (const example of document.querySelectorAll(".example")) {
  example.addEventListener("click", () => send(example.textContent));
}
// iPadOS lays its keyboard over the page instead of making it smaller.
visualViewport?.addEventListener("resize", () => {
  document.documentElement.style.setProperty("--height", `${visualViewport.height}px`);
});

showTree(!SMALL.matches);
setUpSettings();
findModel();
