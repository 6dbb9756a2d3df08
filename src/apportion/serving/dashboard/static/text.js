// Model text as nodes. Only text nodes are ever made from it: whatever it holds, it is shown and never run.

/** Make an element: h("p", {class: "x"}, "text", child). A key beginning with "on" is a listener; null attributes are left out. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

/** Text with ```fences``` and `code` shown as code; everything else as it is. */
export function renderText(text) {
  const fragment = document.createDocumentFragment();
  const parts = text.split(/^```[^\n`]*\n?/m); // odd parts lie inside a fence, an unclosed one included
  parts.forEach((part, i) => {
    if (i % 2) fragment.append(h("pre", {}, h("code", {}, part.replace(/\n$/, ""))));
    else if (part) fragment.append(paragraph(part.replace(/^\n|\n$/g, "")));
  });
  return fragment;
}

function paragraph(text) {
  const element = h("div", { class: "prose" });
  text.split(/(`[^`\n]+`)/).forEach((piece, i) => element.append(i % 2 ? h("code", {}, piece.slice(1, -1)) : piece));
  return element;
}

/** Numbers as people read them: three digits, thousands apart. */
export function number(value, digits = 3) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 100) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(digits)));
}

export function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  const power = value > 0 ? Math.min(Math.floor(Math.log2(value) / 10), units.length - 1) : 0;
  return `${number(value / 1024 ** power)} ${units[power]}`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129600 ? `${number(seconds / 3600, 2)} h` : `${Math.round(seconds / 86400)} days`;
}
