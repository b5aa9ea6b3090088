// SPDX-License-Identifier: MIT
// The streams, a bar of TPS for each with its floor as a line. Of those before their first token:
// what they wait for.

import { told } from "./feed.js";
import { $, ago, few, make, nice, set, whole } from "./parts.js";

const PATIENCE = 15; // looks for which an axis that is too long may stay
const MOST = 8; // floors: what is faster ends at the edge, or the floors could not be seen

let slowest = false, scale = 1, small = 0, opened = null;

export function showStreams() {
  const { last, reach } = told, list = [...last.streams];
  if (slowest) list.sort((a, b) => (a.tps ?? 1e9) - (b.tps ?? 1e9));
  const promised = Math.max(0, ...list.map(s => s.floor || 0));
  const fastest = Math.max(1, ...list.map(s => Math.max(...(reach.get(s.id) || [0]))));
  const peak = promised ? Math.max(1.5 * promised, Math.min(MOST * promised, fastest)) : fastest;
  small = peak < scale / 2 ? small + 1 : 0;
  if (peak > scale || small > PATIENCE) scale = nice(peak);
  set($("top"), few(scale) + " TPS");
  const box = $("streams"), rows = new Map([...box.children].map(row => [row.dataset.id, row]));
  let at = box.firstChild;
  for (const s of list) {
    let row = rows.get(s.id);
    rows.delete(s.id);
    if (!row) row = newRow(s.id);
    if (row !== at) box.insertBefore(row, at); else at = at.nextSibling;
    fillRow(row, s);
  }
  for (const row of rows.values()) row.remove();
  if (!list.length && !box.firstChild) make("li", "none", box, "Nobody asks anything.");
  const hidden = last.num_streams - list.length;
  const waits = list.filter(s => s.tps === null && s.state !== "streaming").length;
  set($("streams-note"), `${last.num_streams - waits} streaming, ${waits} before their first token`
    + (hidden ? `; the ${hidden} best off are not shown` : ""));
}

function newRow(id) {
  const row = make("li", "row");
  row.dataset.id = id;
  row.tabIndex = -1;
  make("span", "name", row);
  const track = make("div", "track", row);
  for (const kind of ["fill", "reach", "floor", "wait"]) make("span", kind, track);
  make("span", "tps", row);
  make("span", "far", row);
  return row;
}

const x = v => Math.min(100, 100 * v / scale) + "%";
const label = s => s.session || s.client || s.id;

function fillRow(row, s) {
  const [name, track, tps, far] = row.children;
  const [fill, whisker, floor, wait] = track.children;
  set(name, label(s) + (s.choices > 1 ? ` ×${s.choices}` : ""));
  row.classList.toggle("below", s.below);
  const streams = s.state === "streaming";
  row.classList.toggle("waits", !streams);
  fill.style.width = x(s.tps || 0);
  const seen = told.reach.get(s.id) || [];
  whisker.hidden = seen.length < 2;
  if (seen.length > 1) {
    whisker.style.left = x(Math.min(...seen));
    whisker.style.right = 100 - parseFloat(x(Math.max(...seen))) + "%";
  }
  floor.hidden = !(s.floor && streams);
  floor.style.left = x(s.floor || 0);
  const words = { prompt: "reading the request", queued: "waiting", prefill: "prefill" };
  const size = s.prompt ? `, ${whole(s.prompt)} tokens` : "";
  set(wait, streams ? "" : `${words[s.state]} for ${ago(s.age_s)}${size}`);
  set(tps, s.tps === null ? (streams ? "…" : "") : (s.below ? "▼ " : "") + few(s.tps));
  set(far, s.floor ? few(s.floor) : "none");
  row.setAttribute("aria-label", `${label(s)}: ` + (streams ? `${few(s.tps || 0)} TPS`
    + (s.floor ? `, floor ${few(s.floor)}` : "") + (s.below ? ", below" : "") : wait.textContent));
  showMore(row, s);
}

function showMore(row, s) {
  const more = row.children[4];
  if (opened !== s.id) { if (more) more.remove(); return; }
  const first = s.first_s === null ? "" : `, first token after ${s.first_s.toFixed(2)} s`;
  const cached = s.cached === null ? "" : ` (${whole(s.cached)} cached)`;
  set(more || make("div", "more", row), `${s.id} · ${s.route}${s.tenant ? " · " + s.tenant : ""}`
    + `${s.client ? " · " + s.client : ""} · prompt ${whole(s.prompt)}${cached}, output `
    + `${whole(s.output)}, ${ago(s.age_s)} old${first}`);
}

export function changeOrder() {
  slowest = !slowest;
  set($("order"), slowest ? "Slowest first" : "Oldest first");
  if (told.last) showStreams();
}

export function moveRow(by) {
  const rows = [...$("streams").querySelectorAll(".row")];
  if (!rows.length) return;
  const now = rows.indexOf(document.activeElement);
  rows[Math.max(0, Math.min(rows.length - 1, now + by))].focus();
}

export function openRow(row) {
  opened = opened === row.dataset.id ? null : row.dataset.id;
  showStreams();
}
