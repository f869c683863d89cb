// Server-sent events from a response body.

/**
 * The `data` of each event, in order.
 *
 * Bytes come in pieces of any size: a piece may end inside a character, inside "\r\n", or hold many events. An event
 * counts once its blank line has come, so a body that breaks off in the middle of one ends without it.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
export async function* eventData(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      rest += done ? decoder.decode() : decoder.decode(value, { stream: true });
      // A "\r" at the very end may be the first half of "\r\n": it waits for the next piece.
      const lines = rest.split(done ? /\r\n|\n|\r/ : /\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (line === "") {
          if (data.length) yield data.join("\n");
          data = [];
        } else if (line.startsWith("data:")) {
          data.push(line.slice(line[5] === " " ? 6 : 5));
        } // comments and other fields mean nothing here
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // the reader may have gone with the connection
  }
}
