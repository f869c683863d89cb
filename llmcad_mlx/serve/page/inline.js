// Markdown inside a line of text: code, bold, italic, struck out, escapes. Builds nodes, never markup.

const DEEPEST = 8; // styles within each other
const ESCAPABLE = /[!-/:-@[-`{-~]/;
const ELEMENTS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

/**
 * Append `text` to `parent` with its styles.
 *
 * What has no end (yet) is shown as it is written.
 *
 * @param {Element} parent
 * @param {string} text
 * @param {(parent: Element, from: number, to: number) => void} emit  appends that slice of `text` as plain text
 */
export function appendInline(parent, text, emit) {
  append(parent, text, 0, text.length, emit, 0);
}

function append(parent, text, from, to, emit, depth) {
  const endless = new Set(); // markers known to have no end from here on, so each is looked for once
  let plain = from;
  const flush = (end) => {
    if (end > plain) emit(parent, plain, end);
  };
  for (let at = from; at < to; ) {
    const found = styleAt(text, at, from, to, endless, depth);
    if (!found) {
      at += text[at] === "`" ? runLength(text, at, to) : 1;
      continue;
    }
    flush(at);
    plain = at = found.next;
    if (found.element === null) {
      plain = found.start; // an escape: its character is the start of what follows
      continue;
    }
    const element = document.createElement(found.element);
    if (found.element === "code") emit(element, found.start, found.end);
    else append(element, text, found.start, found.end, emit, depth + 1);
    parent.append(element);
  }
  flush(to);
}

/** The style that begins at `at`: its element (null: an escape), the slice inside, and where the text goes on. */
function styleAt(text, at, from, to, endless, depth) {
  const mark = text[at];
  if (mark === "\\" && at + 1 < to && ESCAPABLE.test(text[at + 1])) {
    return { element: null, start: at + 1, next: at + 2 };
  }
  if (mark === "`") return codeAt(text, at, to, endless);
  if ((mark !== "*" && mark !== "_" && mark !== "~") || depth >= DEEPEST) return null;
  const run = runLength(text, at, to);
  for (const length of run >= 2 ? [2, 1] : [1]) {
    const marker = mark.repeat(length);
    if (!(marker in ELEMENTS) || endless.has(marker) || !opens(text, at, at + length, from, to)) continue;
    const end = closing(text, marker, at + length, to);
    if (end > at + length) return { element: ELEMENTS[marker], start: at + length, end, next: end + length };
    endless.add(marker);
  }
  return null;
}

function codeAt(text, at, to, endless) {
  const run = runLength(text, at, to);
  const key = `\`${run}`;
  if (endless.has(key)) return null;
  const end = codeEnd(text, at + run, to, run);
  if (end < 0) {
    endless.add(key);
    return null;
  }
  const padded = text[at + run] === " " && text[end - 1] === " " && end - at - run > 2;
  return { element: "code", start: at + run + (padded ? 1 : 0), end: end - (padded ? 1 : 0), next: end + run };
}

function codeEnd(text, at, to, run) {
  while (at < to) {
    at = text.indexOf("`", at);
    if (at < 0 || at >= to) return -1;
    const length = runLength(text, at, to);
    if (length === run) return at;
    at += length;
  }
  return -1;
}

function opens(text, at, inside, from, to) {
  if (inside >= to || /\s/.test(text[inside])) return false;
  return text[at] !== "_" || at === from || !/[\p{L}\p{N}]/u.test(text[at - 1]); // snake_case is a word
}

/** Where `marker` ends the style whose text starts at `at`; -1 when it does not. Code and escapes are passed over. */
function closing(text, marker, at, to) {
  for (let here = at; here < to; ) {
    const mark = text[here];
    if (mark === "\\") here += 2;
    else if (mark === "`") {
      const run = runLength(text, here, to);
      const end = codeEnd(text, here + run, to, run);
      here = end < 0 ? here + run : end + run;
    } else if (mark === marker[0]) {
      const run = runLength(text, here, to);
      const fits = marker.length === 2 ? run >= 2 : run !== 2;
      const end = here + run - marker.length;
      const word = mark === "_" && here + run < to && /[\p{L}\p{N}]/u.test(text[here + run]);
      if (fits && here > at && !/\s/.test(text[here - 1]) && !word) return end;
      here += run;
    } else here++;
  }
  return -1;
}

function runLength(text, at, to) {
  let end = at;
  while (end < to && text[end] === text[at]) end++;
  return end - at;
}
