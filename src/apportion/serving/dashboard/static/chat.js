// The conversation: sends, streams, stops, and says in words what went wrong.

import { ApiError, streamChat } from "./api.js";
import { h, number, renderText } from "./text.js";

const SUGGESTIONS = ["Tell me a short story about a lighthouse.", "Explain how rain forms, in three sentences.", "Name three uses for an empty jar."];
const NUMBERS = ["top_k", "max_tokens", "seed", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"];
const SETTINGS = ["system", "temperature", "top_p", ...NUMBERS, "stop"];
const find = (id) => document.getElementById(id);

const conversation = []; // {role, content}
let running = null; // the AbortController of the answer that streams
let pinned = true; // the reader is at the end and wants to stay there
let askForKey = async () => false;

export function setUpChat(keyAsker) {
  askForKey = keyAsker;
  const prompt = find("prompt");
  find("suggestions").append(...SUGGESTIONS.map((text) => h("li", {}, h("button", { type: "button", onclick: () => send(text) }, text))));
  find("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    running ? stop() : send(prompt.value);
  });
  prompt.addEventListener("input", grow);
  prompt.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    if (!running) send(prompt.value);
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) stop();
  });
  find("clear").addEventListener("click", clear);
  const box = find("scroller");
  let top = 0;
  box.addEventListener("scroll", () => {
    if (box.scrollTop < top) pinned = false;
    if (box.scrollHeight - box.scrollTop - box.clientHeight < 40) pinned = true;
    top = box.scrollTop;
  });
  setUpSettings();
}

function setUpSettings() {
  const saved = JSON.parse(localStorage.getItem("settings") ?? "{}");
  for (const id of SETTINGS) {
    const input = find(id);
    if (id in saved) input.value = saved[id];
    input.addEventListener("input", () => {
      showValue(input);
      localStorage.setItem("settings", JSON.stringify(Object.fromEntries(SETTINGS.map((name) => [name, find(name).value]))));
    });
    showValue(input);
  }
  find("reset").addEventListener("click", () => {
    for (const id of SETTINGS) {
      find(id).value = find(id).defaultValue;
      showValue(find(id));
    }
    localStorage.removeItem("settings");
  });
}

function showValue(input) {
  const output = document.querySelector(`output[for="${input.id}"]`);
  if (output) output.value = Number(input.value).toFixed(2).replace(/0$/, "");
}

/** The fields of a request; what is left empty is the server's to decide. */
function settings() {
  const fields = { temperature: Number(find("temperature").value), top_p: Number(find("top_p").value) };
  for (const id of NUMBERS) if (find(id).value !== "") fields[id] = Number(find(id).value);
  const stops = find("stop").value.split("\n").filter((text) => text !== "");
  if (stops.length) fields.stop = stops;
  return fields;
}

async function send(text) {
  if (!text.trim() || running) return;
  document.body.dataset.view = "chat";
  find("prompt").value = "";
  grow();
  conversation.push({ role: "user", content: text });
  find("log").append(h("li", { class: "user" }, h("div", { class: "prose" }, text)));
  await answer();
}

async function answer() {
  const text = h("div", { class: "text" }, h("span", { class: "caret", "aria-hidden": "true" }));
  const foot = h("p", { class: "foot" });
  const item = h("li", { class: "assistant", "aria-busy": "true" }, text, foot);
  find("log").append(item);
  running = new AbortController();
  showRunning();
  follow(true);
  const reply = new Reply(text);
  const system = find("system").value.trim();
  const messages = [...(system ? [{ role: "system", content: system }] : []), ...conversation];
  try {
    for await (const event of streamChat({ model: find("model").value, messages, ...settings() }, running.signal)) reply.take(event);
  } catch (error) {
    await fail(error, reply, item);
  }
  running = null;
  reply.finish();
  item.removeAttribute("aria-busy");
  if (reply.content) conversation.push({ role: "assistant", content: reply.content });
  foot.append(...reply.footer());
  showRunning();
  follow();
}

/** What arrives of one answer, shown at most once a frame. */
class Reply {
  content = "";
  reasoning = "";
  usage = null;
  reason = null;
  note = null;
  started = performance.now();
  first = null;
  last = null;
  frame = 0;

  constructor(element) {
    this.element = element;
  }

  take(event) {
    if (event.usage) this.usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    const delta = choice.delta ?? {};
    if (delta.content || delta.reasoning_content) {
      this.last = performance.now();
      this.first ??= this.last;
      this.content += delta.content ?? "";
      this.reasoning += delta.reasoning_content ?? "";
    }
    this.reason = choice.finish_reason ?? this.reason;
    this.frame ||= requestAnimationFrame(() => this.show(true));
  }

  show(streaming) {
    this.frame = 0;
    const open = this.element.querySelector("details")?.open ?? false;
    const parts = [renderText(this.content.trimStart())];
    if (this.reasoning) {
      const thinking = h("details", open || !this.content ? { open: "" } : {}, h("summary", {}, "Thinking"), h("div", { class: "prose" }, this.reasoning));
      parts.unshift(thinking);
    }
    this.element.replaceChildren(...parts);
    if (streaming) (this.element.lastElementChild ?? this.element).append(h("span", { class: "caret", "aria-hidden": "true" }));
    follow();
  }

  finish() {
    cancelAnimationFrame(this.frame);
    this.show(false);
  }

  footer() {
    const facts = [];
    const tokens = this.usage?.completion_tokens;
    if (this.first !== null) facts.push(`first token ${number(this.first - this.started)} ms`);
    if (tokens > 1 && this.last - this.first > 20) facts.push(`${number((1000 * (tokens - 1)) / (this.last - this.first))} tokens/s`);
    if (tokens) facts.push(`${tokens} tokens`);
    if (this.reason === "length") facts.push("cut at max tokens");
    if (this.note) facts.push(this.note);
    const copy = h("button", { class: "quiet", type: "button", onclick: () => copyText(this.content, copy) }, "Copy");
    return [h("span", {}, facts.join(" · ")), ...(this.content ? [copy] : [])];
  }
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here";
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}

async function fail(error, reply, item) {
  if (error.name === "AbortError") {
    reply.note = "stopped";
    return;
  }
  const known = error instanceof ApiError;
  if (!known) console.error(error);
  const again = async () => {
    if (running) return;
    item.remove();
    if (reply.content) conversation.pop();
    await answer();
  };
  const words = known ? error.message : "This page could not read the answer.";
  item.append(h("div", { class: "error", role: "alert" }, h("p", {}, words), h("button", { class: "quiet", type: "button", onclick: again }, "Try again")));
  if (error.status === 401 && (await askForKey())) setTimeout(again);
}

export function stop() {
  running?.abort();
}

function clear() {
  stop();
  conversation.length = 0;
  find("log").replaceChildren();
  showRunning();
  find("prompt").focus();
}

function showRunning() {
  const button = find("send");
  document.body.classList.toggle("running", running !== null);
  button.setAttribute("aria-label", running ? "Stop" : "Send");
  const isEmpty = !find("log").childElementCount;
  find("empty").hidden = !isEmpty;
  find("clear").hidden = isEmpty;
}

/** Keep the newest line in sight unless the reader has scrolled away from it. */
function follow(always = false) {
  pinned ||= always;
  if (pinned) find("scroller").scrollTop = find("scroller").scrollHeight;
}

function grow() {
  const prompt = find("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 220)}px`;
}
