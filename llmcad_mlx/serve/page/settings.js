// System prompt, sampling and speculation settings: the dialog, and what of it goes into a request.

const STORED = "llmcad-mlx.settings";
const NUMBERS = ["temperature", "max_tokens", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "tree_nodes"];
const DEFAULTS = { temperature: "0", top_p: "off", top_k: "off", min_p: "off", repetition_penalty: "off" };
const TEXTS = ["system", "policy"];

let unstored = null; // settings that the browser would not keep

const byId = (id) => document.getElementById(id);

/** Fields that were filled in; a missing one leaves the choice to the server. */
export function requestFields() {
  const { system, ...fields } = load();
  return { system: system ?? "", fields };
}

/** Wire the dialog to its button. */
export function setUpSettings() {
  const dialog = byId("settings");
  const form = byId("settings-form");
  byId("settings-open").addEventListener("click", () => {
    fill(form, load());
    showProblem("");
    dialog.showModal();
  });
  byId("settings-cancel").addEventListener("click", () => dialog.close());
  byId("settings-clear").addEventListener("click", () => fill(form, {}));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const wrong = NUMBERS.map((name) => form.elements[name]).find((field) => !field.checkValidity());
    if (wrong) {
      showProblem(`${wrong.labels[0].textContent.trim()}: ${wrong.validationMessage}`);
      wrong.focus();
      return;
    }
    save(read(form));
    dialog.close();
  });
}

/** Say in empty fields what the server chooses. @param {object} sampling  what it has on its own account */
export function showDefaults(sampling) {
  const fields = byId("settings-form").elements;
  for (const [name, none] of Object.entries(DEFAULTS)) fields[name].placeholder = sampling[name] ?? none;
}

function fill(form, settings) {
  for (const name of [...TEXTS, ...NUMBERS]) form.elements[name].value = settings[name] ?? "";
}

function read(form) {
  const settings = {};
  for (const name of TEXTS) if (form.elements[name].value.trim()) settings[name] = form.elements[name].value;
  for (const name of NUMBERS) if (form.elements[name].value !== "") settings[name] = form.elements[name].valueAsNumber;
  return settings;
}

function showProblem(text) {
  byId("settings-error").textContent = text;
  byId("settings-error").hidden = !text;
}

/** What was saved, as far as it still makes sense: only known fields of the right type. */
function load() {
  if (unstored) return unstored;
  let stored;
  try {
    stored = JSON.parse(localStorage.getItem(STORED) ?? "{}");
  } catch {
    return {}; // storage is off, or somebody wrote into it
  }
  const settings = {};
  for (const name of TEXTS) if (typeof stored?.[name] === "string") settings[name] = stored[name];
  for (const name of NUMBERS) if (Number.isFinite(stored?.[name])) settings[name] = stored[name];
  return settings;
}

function save(settings) {
  unstored = settings;
  try {
    localStorage.setItem(STORED, JSON.stringify(settings));
    unstored = null;
  } catch {
    // storage is off: the settings live as long as the page
  }
}
