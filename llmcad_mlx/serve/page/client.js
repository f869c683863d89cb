// The server's HTTP API, as this page uses it. Addresses are relative: the page also works below a path.

import { eventData } from "./sse.js";

const UNREACHABLE = "The server cannot be reached; check that llmcad-mlx serve is still running.";
const LONGEST = 300; // characters of a message in the error line

/** What went wrong, in one line for the user. `status`: the HTTP status, 0 when none came. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.name = "ServerError";
    this.status = status;
  }
}

/**
 * The models that the server has. Throws ServerError.
 * @param {string} key  API key, "" for none
 */
export async function listModels(key) {
  const response = await send("v1/models", { headers: headers(key) });
  const list = await response.json().catch(() => null);
  if (!Array.isArray(list?.data)) throw new ServerError("The server's list of models cannot be read.");
  return list.data;
}

/**
 * The chunks of a streamed chat completion. Throws ServerError; AbortError when `signal` ends it.
 * @param {object} request  fields of the OpenAI API and of this server
 * @param {string} key
 * @param {AbortSignal} signal
 */
export async function* streamChat(request, key, signal) {
  const response = await send("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify(request),
    signal,
  });
  try {
    for await (const data of eventData(response.body)) {
      if (data === "[DONE]") return;
      const chunk = parse(data);
      if (chunk.error) throw new ServerError(oneLine(chunk.error.message), response.status);
      yield chunk;
    }
  } catch (error) {
    throw error instanceof TypeError ? new ServerError("The connection broke; the answer is cut off.") : error;
  }
  throw new ServerError("The server closed the connection; the answer is cut off.");
}

/**
 * Markdown as HTML. Throws ServerError.
 * @param {string} text
 * @param {string} key
 * @returns {Promise<{length: number, html: string}[]>}  blocks; `length`: of the text that one is made from
 */
export async function renderMarkdown(text, key) {
  const response = await send("markdown", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...headers(key) },
    body: JSON.stringify({ text }),
  });
  return (await response.json()).blocks;
}

async function send(address, options) {
  let response;
  try {
    response = await fetch(address, { cache: "no-store", ...options });
  } catch (error) {
    throw error instanceof TypeError ? new ServerError(UNREACHABLE) : error;
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  let message = oneLine(body?.error?.message) || `The server answered with status ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  if (response.status === 429 && /^\d+$/.test(wait ?? "")) message += ` Try again in ${wait} s.`;
  return new ServerError(message, response.status);
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

function parse(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ServerError("The server sent something that is not JSON; the answer is cut off.");
  }
}

function oneLine(message) {
  if (typeof message !== "string") return "";
  const line = message.replace(/\s+/g, " ").trim();
  return line.length > LONGEST ? `${line.slice(0, LONGEST - 1)}…` : line;
}
