// Talking to the server: the key, errors in words, and reading an event stream.

const KEY = "apportion-key";

/** An answer that is an error. `status` is 0 when there was no answer. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function call(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server does not answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, sentence(body.error?.message ?? `The server answered with status ${response.status}.`));
}

/** A capital at the beginning, unless that is a field's name, and a full stop. */
function sentence(text) {
  const words = text.trim();
  const begun = /^[a-z]+[ ,]/.test(words) ? words.charAt(0).toUpperCase() + words.slice(1) : words;
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}

export const getJson = async (path) => (await call(path)).json();

/** Yields the events of a streamed completion. Throws ApiError for a refusal, or for an error within the stream. */
export async function* streamChat(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let complete = false;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The connection broke before the answer was complete.");
    });
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") {
        complete = true;
        continue;
      }
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.code ?? 500, sentence(event.error.message));
      yield event;
    }
  }
  if (!complete) throw new ApiError(0, "The answer ended early.");
}
