// SPDX-License-Identifier: MIT
// What the server does, second by second: shows what is told, and does what hands ask for.

import { readAt, readNow, setSpan, showStrips, step } from "./charts.js";
import { follow, told } from "./feed.js";
import { showCache, showDrafts, showTiles } from "./now.js";
import { $, set, share } from "./parts.js";
import { changeOrder, moveRow, openRow, showStreams } from "./streams.js";

const THEMES = ["auto", "light", "dark"];
let paused = false, said = "";

function show() {
  const last = told.last;
  if (!last || paused) return;
  const s = last.second;
  set($("model"), last.model);
  set($("state"), last.loading ? `${last.state} ${share(last.loading.fraction)}` : last.state);
  $("state").className = last.state === "ready" ? "good" : "bad";
  document.title = (s.below ? `(${s.below} below) ` : "") + "TokenSpeed " + last.model;
  showTiles(s);
  showStreams();
  showCache();
  showDrafts();
  showStrips();
  const now = s.below ? `${s.below} of ${s.floored} streams below their floor`
    : last.state === "ready" ? "" : "the server is " + last.state;
  if (now !== said) set($("say"), now || "all streams at their floor");
  said = now;
}

const spans = () => document.querySelectorAll("[data-span]");

function changeSpan(value) {
  setSpan(value);
  for (const button of spans()) button.setAttribute("aria-pressed", +button.dataset.span === value);
  if (told.last) showStrips();
}

function pause() {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", paused);
  set($("pause"), paused ? "Paused" : "Pause");
  show();
}

function setTheme(next) {
  if (next === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  localStorage.setItem("theme", next);
  set($("theme"), "Theme: " + next);
}

const nextTheme = () => setTheme(THEMES[(THEMES.indexOf(localStorage.getItem("theme")) + 1) % 3]);
const help = () => $("keys").showModal();

const HANDS = {
  1: () => changeSpan(120), 2: () => changeSpan(600), 3: () => changeSpan(3600), p: pause,
  t: nextTheme, o: changeOrder, "?": help, ArrowLeft: () => step(-1), ArrowRight: () => step(1),
  ArrowUp: () => moveRow(-1), ArrowDown: () => moveRow(1), Escape: readNow,
};

addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (document.querySelector("dialog[open]")) return;
  const row = event.key === "Enter" && document.activeElement.closest(".row");
  if (row) openRow(row);
  else if (HANDS[event.key]) { HANDS[event.key](); event.preventDefault(); }
});
$("streams").addEventListener("click", event => {
  const row = event.target.closest(".row");
  if (row) openRow(row);
});
$("strips").addEventListener("pointermove", event => {
  const box = $("strips").getBoundingClientRect();
  readAt((event.clientX - box.left) / box.width);
});
$("strips").addEventListener("pointerleave", readNow);
$("pause").addEventListener("click", pause);
$("theme").addEventListener("click", nextTheme);
$("order").addEventListener("click", changeOrder);
$("help").addEventListener("click", help);
for (const button of spans())
  button.addEventListener("click", () => changeSpan(+button.dataset.span));

const asked = localStorage.getItem("theme");
setTheme(THEMES.includes(asked) ? asked : "auto");
changeSpan(600);
follow(show);
