// The figures of the answer that is being written, or of the latest one.

const byId = (id) => document.getElementById(id);

/** @param {import("./answer.js").Answer["figures"]} figures */
export function showFigures(figures) {
  byId("speed").textContent = decimal(figures.tokens_per_s, 1);
  byId("per-pass").textContent = decimal(figures.tokens_per_pass, 2);
  byId("acceptance").textContent = percent(figures.acceptance_rate);
  showMemory(figures.peak_rss_bytes, figures.budget_bytes);
}

/** The figures of one answer as one line. */
export function summary(answer) {
  const { tokens_per_s, tokens_per_pass, acceptance_rate } = answer.figures;
  const parts = [`${answer.numTokens} ${answer.numTokens === 1 ? "token" : "tokens"}`];
  if (isNumber(tokens_per_s)) parts.push(`${decimal(tokens_per_s, 1)} tokens/s`);
  if (isNumber(tokens_per_pass)) parts.push(`${decimal(tokens_per_pass, 2)} per pass`);
  if (isNumber(acceptance_rate)) parts.push(`${percent(acceptance_rate)} accepted`);
  return parts.join(" · ");
}

/** "83 %", or "–" when there is no number. */
export function percent(share) {
  return isNumber(share) ? `${Math.round(share * 100)} %` : "–";
}

function showMemory(peak, budget) {
  byId("memory").textContent = bytes(peak);
  byId("limit").textContent = isNumber(budget) ? ` of ${bytes(budget)}` : "";
  byId("budget").hidden = !(isNumber(budget) && isNumber(peak) && budget > 0);
  if (byId("budget").hidden) return;
  byId("budget").classList.toggle("over", peak > budget);
  byId("budget-used").style.width = `${Math.min(100, (100 * peak) / budget)}%`;
}

function isNumber(value) {
  return typeof value === "number" && Number.isFinite(value);
}

function decimal(value, places) {
  return isNumber(value) ? value.toFixed(places) : "–";
}

function bytes(value) {
  if (!isNumber(value)) return "–";
  return value < 1e9 ? `${Math.round(value / 1e6)} MB` : `${(value / 1e9).toFixed(2)} GB`;
}
