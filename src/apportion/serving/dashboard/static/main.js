// Puts the page together: theme, views, the key, the model choice, and whether the server is well.

import { hasKey, setKey } from "./api.js";
import { setUpChat } from "./chat.js";
import { poll, setUpLive } from "./live.js";
import { h } from "./text.js";

const find = (id) => document.getElementById(id);

// Theme

const isDark = () => (document.documentElement.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const nameTheme = () => find("theme").setAttribute("aria-label", `Switch to ${isDark() ? "light" : "dark"} colours`);
find("theme").addEventListener("click", () => {
  const next = isDark() ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  nameTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
nameTheme();

// Views, on narrow screens

const tabs = [...document.querySelectorAll("[data-show]")];
const showView = () => tabs.forEach((tab) => (tab.dataset.show === document.body.dataset.view ? tab.setAttribute("aria-current", "page") : tab.removeAttribute("aria-current")));
for (const tab of tabs) tab.addEventListener("click", () => (document.body.dataset.view = tab.dataset.show));
new MutationObserver(showView).observe(document.body, { attributeFilter: ["data-view"] });

// The key

let declined = false;

/** Resolves to whether a key was given. */
function askForKey() {
  const dialog = find("key-dialog");
  if (dialog.open) return Promise.resolve(false);
  find("key-why").textContent = hasKey() ? "The key was not accepted. Try another one." : "It stays in this tab and is gone when you close it.";
  find("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "ok" && find("key").value !== "";
        declined = !given;
        if (given) {
          setKey(find("key").value.trim());
          poll();
        }
        resolve(given);
      },
      { once: true },
    );
  });
}

find("key-later").addEventListener("click", () => find("key-dialog").close(""));

// Health and models

function say(state, words) {
  const health = find("health");
  if (health.dataset.state === state && health.lastElementChild.textContent === words) return; // a status is read out when it changes
  health.dataset.state = state;
  health.lastElementChild.textContent = words;
}

function note(words) {
  find("live-note").textContent = words;
}

function onState(stats, error) {
  if (error?.status === 401) {
    say("wait", "Key needed");
    note("The numbers need a key.");
    if (!declined) askForKey();
  } else if (error) {
    say("bad", error.status ? "In trouble" : "No connection");
    note(error.status ? error.message : "The server does not answer. Trying again every second.");
  } else if (stats.not_ready) {
    say("wait", stats.engine_deaths ? "Restarting" : "Starting");
  } else {
    say("good", "Ready");
  }
  if (stats) showModels(stats.models);
}

function showModels(models) {
  const select = find("model");
  const options = models.map((model) => [model.name, model.state === "loaded" ? model.name : `${model.name} (${model.state})`]);
  const now = JSON.stringify(options);
  if (!models.length || select.dataset.options === now) return;
  const chosen = select.disabled ? localStorage.getItem("model") : select.value;
  select.dataset.options = now;
  select.replaceChildren(...options.map(([value, text]) => h("option", { value }, text)));
  if (models.some((model) => model.name === chosen)) select.value = chosen;
  select.disabled = false;
}

find("model").addEventListener("change", (event) => localStorage.setItem("model", event.target.value));

setUpChat(askForKey);
setUpLive(onState);
