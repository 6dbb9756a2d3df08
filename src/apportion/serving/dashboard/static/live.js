// The live view: reads /stats once a second while the page is seen, and shows what happened between two readings.

import { getJson } from "./api.js";
import { bytes, duration, h, number } from "./text.js";

const EVERY_MS = 1000;
const KEEP = 120; // readings
const find = (id) => document.getElementById(id);
const readings = []; // {time, tokensPerS, ttft, itl, running, waiting}
const ttfts = new Map(); // by model: the latest mean time to first token, in ms

const TILES = [
  { key: "tokensPerS", name: "Output", unit: "tokens/s", empty: "0" },
  { key: "ttft", name: "Time to first token", unit: "ms", mean: true },
  { key: "itl", name: "Between tokens", unit: "ms", mean: true },
  { key: "running", name: "Running", unit: "", empty: "0", second: { key: "waiting", name: "waiting" } },
];

let before = null;
let timer = 0;
let onState = () => {};

/** tell(stats or null, error or null): after every reading. */
export function setUpLive(tell) {
  onState = tell;
  find("tiles").replaceChildren(...TILES.map(makeTile));
  document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : poll()));
  poll();
}

export async function poll() {
  clearTimeout(timer);
  let stats = null;
  try {
    stats = await getJson("stats");
    show(stats);
    onState(stats, null);
  } catch (error) {
    onState(null, error);
  }
  find("live-note").hidden = stats !== null;
  if (!document.hidden) timer = setTimeout(poll, EVERY_MS);
}

function show(stats) {
  const sums = total(stats.models);
  if (before && stats.uptime_s < before.uptime) {
    before = null; // another server
    ttfts.clear();
  }
  if (before) {
    const seconds = stats.time - before.time;
    readings.push({
      tokensPerS: Math.max(0, sums.generation_tokens - before.generation_tokens) / seconds,
      ttft: mean(sums, before, "ttft"),
      itl: mean(sums, before, "itl"),
      running: sums.running,
      waiting: sums.waiting,
    });
    if (readings.length > KEEP) readings.shift();
  }
  for (const model of stats.models) {
    const then = before?.byModel.get(model.name);
    const now = then && mean(model, then, "ttft");
    if (now) ttfts.set(model.name, now);
  }
  before = { ...sums, time: stats.time, uptime: stats.uptime_s, byModel: new Map(stats.models.map((model) => [model.name, model])) };
  TILES.forEach(showTile);
  find("models").replaceChildren(modelTable(stats.models));
  showMemory(stats);
  find("lanes").replaceChildren(laneList(stats.lanes));
  const facts = [`version ${stats.version}`, `up ${duration(stats.uptime_s)}`, `engine memory ${bytes(stats.engine_rss_bytes)}`];
  if (stats.engine_deaths) facts.push(`the engine died ${stats.engine_deaths === 1 ? "once" : `${stats.engine_deaths} times`}`);
  find("foot").textContent = facts.join(" · ");
}

function total(models) {
  const names = ["generation_tokens", "ttft_sum", "ttft_count", "itl_sum", "itl_count", "running", "waiting"];
  return Object.fromEntries(names.map((name) => [name, models.reduce((sum, model) => sum + model[name], 0)]));
}

/** Milliseconds; null when nothing happened in between. */
function mean(now, then, name) {
  const count = now[`${name}_count`] - then[`${name}_count`];
  return count > 0 ? (1000 * (now[`${name}_sum`] - then[`${name}_sum`])) / count : null;
}

// Tiles

function makeTile(tile) {
  tile.value = h("b", {}, "–");
  tile.small = h("small", {}, "");
  tile.chart = svg("svg", { viewBox: "0 0 120 32", preserveAspectRatio: "none", "aria-hidden": "true" });
  return h("div", { class: "tile" }, h("span", {}, tile.name), h("p", {}, tile.value, tile.small), tile.chart);
}

function showTile(tile) {
  const values = readings.map((reading) => reading[tile.key]);
  // A mean of a second without a token is unknown, not zero: the latest known one stays, for ten seconds.
  const recent = tile.mean ? values.slice(-10).filter((value) => value !== null) : values;
  const value = recent.length ? recent[recent.length - 1] : null;
  tile.value.textContent = value === null ? (tile.empty ?? "–") : number(value);
  tile.small.textContent = tile.second ? ` ${readings.at(-1)?.[tile.second.key] ?? 0} ${tile.second.name}` : ` ${tile.unit}`;
  const lines = [spark(values, "line")];
  if (tile.second) lines.unshift(spark(readings.map((reading) => reading[tile.second.key]), "line second", values));
  tile.chart.replaceChildren(...lines.flat());
}

const svg = (name, attributes) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};

/** The line of a series through its known values, the area under it, and a dot on the newest. `others` share its scale. */
function spark(values, kind, others = []) {
  const most = Math.max(1e-9, ...values.map((value) => value ?? 0), ...others.map((value) => value ?? 0));
  const points = values.flatMap((value, i) => (value === null ? [] : [[120 - ((values.length - 1 - i) * 120) / (KEEP - 1), 29 - (26 * value) / most]]));
  if (!points.length) return [];
  const line = points.map(([x, y]) => `${x.toFixed(1)} ${y.toFixed(1)}`).join("L");
  const [first, last] = [points[0], points.at(-1)];
  const drawn = [svg("path", { d: `M${line}`, class: kind })];
  if (kind === "line") drawn.unshift(svg("path", { d: `M${first[0]} 32L${line}L${last[0]} 32z`, class: "area" }));
  if (values.at(-1) === null) drawn.push(svg("path", { d: `M${last[0]} ${last[1]}h.01`, class: `${kind} dot` }));
  return drawn;
}

// Tables

const STATES = { loaded: "ready", loading: "loading", unloaded: "not loaded", failed: "failed" };

function modelTable(models) {
  if (!models.length) return h("p", { class: "none" }, "No model yet. The engine is starting.");
  const cell = (text) => h("td", {}, text);
  const ttft = (model) => (ttfts.has(model.name) ? `${number(ttfts.get(model.name))} ms` : "–");
  const rows = models.map((model) => {
    const share = model.prefix_cache_queries ? `${number((100 * model.prefix_cache_hits) / model.prefix_cache_queries, 2)} %` : "–";
    const name = h("th", { scope: "row" }, h("span", { class: "name", title: model.name }, model.name), h("span", { class: `state ${model.state}` }, STATES[model.state] ?? model.state));
    return h("tr", {}, name, cell(number(model.running)), cell(number(model.waiting)), cell(number(model.generation_tokens)), cell(ttft(model)), cell(share));
  });
  const heads = ["Model", "Running", "Waiting", "Tokens", "TTFT", "Prefix hits"].map((text) => h("th", { scope: "col" }, text));
  const failed = models.filter((model) => model.error).map((model) => h("p", { class: "note" }, `${model.name}: ${model.error}`));
  return h("div", {}, h("table", {}, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...rows)), ...failed);
}

function showMemory(stats) {
  const whole = stats.kv_total_bytes;
  find("kv-total").textContent = whole ? bytes(whole) : "";
  if (!whole) {
    find("kv").replaceChildren(h("p", { class: "none" }, "Set aside when the engine starts."));
    return;
  }
  const owners = stats.models.filter((model) => model.kv_bytes > 0).map((model, i) => ({ model, i, used: Math.min(model.kv_bytes, model.kv_usage * whole) }));
  const free = whole - owners.reduce((sum, { model }) => sum + model.kv_bytes, 0);
  const parts = owners.flatMap(({ model, i, used }) => [[`owner-${i % 6}`, used], [`owner-${i % 6} rest`, model.kv_bytes - used]]);
  const rows = owners.map(({ model, i, used }) => [`owner-${i % 6}`, model.name, `${bytes(used)} in use, ${bytes(model.kv_bytes - used)} cached`]);
  rows.push(["free", "free", bytes(free)]);
  const bar = h("div", { class: "bar", role: "img", "aria-label": rows.map(([, name, words]) => `${name} ${words}`).join("; ") });
  for (const [kind, size] of [...parts, ["free", free]]) {
    if (size <= 0) continue;
    const part = h("i", { class: kind });
    part.style.flexGrow = size / whole;
    bar.append(part);
  }
  const keys = rows.map(([kind, name, words]) => h("li", {}, h("i", { class: kind }), h("span", {}, name), h("b", {}, words)));
  find("kv").replaceChildren(bar, h("ul", { class: "keys" }, ...keys));
}

function laneList(lanes) {
  if (!lanes.length) return h("p", { class: "none" }, "A lane computes steps. None runs yet.");
  const threads = lanes.reduce((sum, lane) => sum + lane.num_threads, 0);
  return h(
    "ul",
    { class: "lanes" },
    ...lanes.map((lane) => {
      const share = lane.num_threads ? `${lane.num_threads} of ${threads} threads` : lanes.length === 1 ? "the whole device" : "what others leave";
      const bar = h("div", { class: "bar", "aria-hidden": "true" }, h("i", { class: lane.in_flight ? "owner-0" : "owner-0 rest" }), h("i", { class: "free" }));
      bar.firstChild.style.flexGrow = lane.num_threads && threads ? lane.num_threads / threads : lanes.length === 1 ? 1 : 0;
      bar.lastChild.style.flexGrow = 1 - Number(bar.firstChild.style.flexGrow);
      const work = `${lane.phases.join(" and ")}${lane.models.length ? ` of ${lane.models.join(", ")}` : ""}`;
      const deaths = lane.num_deaths ? ` · restarted ${lane.num_deaths === 1 ? "once" : `${lane.num_deaths} times`}` : "";
      return h("li", {}, h("p", {}, h("b", {}, lane.name), h("span", {}, share)), bar, h("p", { class: "small" }, `${work} · ${lane.in_flight} ${lane.in_flight === 1 ? "step" : "steps"} in flight${deaths}`));
    }),
  );
}
