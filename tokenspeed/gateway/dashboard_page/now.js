// SPDX-License-Identifier: MIT
// The server now: tiles, the KV cache by tier and by session, and what became of drafts.

import { latest, sum, told } from "./feed.js";
import { $, ago, exactly, few, key, make, set, share, whole } from "./parts.js";

function tile(i, label, value, under, bad) {
  const box = $("tiles").children[i] || make("div", "tile", $("tiles"));
  if (!box.firstChild) for (const tag of ["span", "b", "span"]) make(tag, "", box);
  set(box.children[0], label);
  set(box.children[1], value);
  set(box.children[2], under);
  box.children[2].title = under;
  box.classList.toggle("bad", !!bad);
}

export function showTiles(s) {
  const minute = latest(60), length = sum(minute, "seconds") || 1, last = told.last;
  const rate = name => 60 * sum(minute, name) / length;
  const hits = rows => sum(rows, "hits") / sum(rows, "queries");
  const long = latest(600), held = sum(long, "held_s");
  const attained = held / (held + sum(long, "missed_s"));
  const low = s.lowest === null ? "no stream" : `slowest ${few(s.lowest)} TPS`;
  tile(0, "At their floor", s.floored ? `${s.floored - s.below} of ${s.floored}` : "–",
    isNaN(attained) ? low : `10 minutes: ${exactly(attained)}`, s.below);
  tile(1, "Output, tokens/min", whole(rate("output")), "mean of a minute");
  tile(2, "Prefill, tokens/min", whole(rate("prefill")), `+ ${whole(rate("hits"))} cached`);
  tile(3, "Prompt tokens cached", share(hits(minute)), `10 minutes: ${share(hits(long))}`);
  const before = last.streams.filter(one => one.state !== "streaming");
  const longest = Math.max(0, ...before.map(one => one.age_s));
  tile(4, "Waiting", whole(s.waiting),
    before.length ? `${before.length} unanswered, ${ago(longest)}` : "nobody");
  const reasons = Object.entries(last.refused).filter(one => one[1]);
  tile(5, "Refused, last minute", whole(sum(minute, "refused")),
    reasons.map(([why, count]) => `${why} ${whole(count)}`).join(", ") || "none since the start",
    sum(minute, "refused"));
  tile(6, "Step", ...stepTime(latest(10)));
  tile(7, "KV held", share(s.held), `idle ${share(s.idle)}, free ${share(1 - s.held - s.idle)}`);
}

function stepTime(rows) {
  const steps = sum(rows, "steps");
  const error = sum(rows, "predicted_s") / sum(rows, "measured_s") - 1;
  return [steps ? few(1000 * sum(rows, "busy_s") / steps) + " ms" : "–",
    isNaN(error) ? `${few(steps / (sum(rows, "seconds") || 1))} a second`
      : `foretold ${error < 0 ? "−" : "+"}${Math.abs(100 * error).toFixed(0)}%`];
}

export function showCache() {
  const engines = told.last.engines;
  const pages = sum(engines, "pages"), size = engines[0].page_size;
  set($("kv-note"), `device memory, the one tier: ${whole(pages)} pages of ${size} tokens`);
  const box = $("tiers");
  box.replaceChildren();
  engines.forEach((e, i) => {
    if (engines.length > 1) make("div", "key", box,
      `Engine ${i}: ${e.state}, ${e.running} running, ${e.waiting} waiting`);
    showTier(box, e);
  });
  showSessions(pages * size);
}

function showTier(box, e) {
  const idle = e.pages ? e.idle_pages / e.pages : 0;
  const bar = make("div", "bar", box);
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", `held ${share(e.held)}, idle ${share(idle)}`);
  const parts = [["held by requests", e.held, "--decode"], ["idle, kept for a hit", idle, "--idle"],
    ["free", Math.max(0, 1 - e.held - idle), "--track"]];
  const legend = make("div", "legend", box);
  for (const [name, value, color] of parts) {
    const part = make("div", "", bar);
    part.style.width = 100 * value + "%";
    part.style.background = `var(${color})`;
    key(legend, name, share(value), color);
  }
  if (e.retained_pages + e.pinned_pages) make("span", "key", legend,
    `retained ${whole(e.retained_pages)}, pinned ${whole(e.pinned_pages)} pages`);
}

function showSessions(room) {
  const sessions = told.last.sessions, now = told.last.second.at;
  const size = s => s.held || s.context, length = s => Math.max(s.held, s.context);
  const longest = Math.max(1, ...sessions.map(length));
  rows($("sessions"), sessions, 8, "No client has named a session.", (row, s) => {
    const texts = [s.session + (s.pinned ? " (pinned)" : ""), whole(size(s)), null,
      room ? exactly(size(s) / room) : "–", whole(s.turns), share(s.hit_rate),
      s.tps ? few(s.tps) : "–", s.running ? "now" : ago(now - s.last_seen)];
    texts.forEach((text, k) => { if (text !== null) set(row.children[k], text); });
    row.children[0].title = `${s.session} ${s.tenant} ${s.client}`;
    meter(row.children[2], s.held / longest, "--decode", (length(s) - s.held) / longest);
  });
}

export function showDrafts() {
  const drafters = told.last.drafters;
  $("drafts").hidden = !drafters.length;
  rows($("drafters"), drafters, 6, "", (row, d) => {
    const accepted = d.drafted ? d.accepted / d.drafted : null;
    const each = count => d.drafts ? few(count / d.drafts) : "–";
    const texts = [d.name, share(accepted), null, each(d.drafted), each(d.accepted), whole(d.drafts)];
    texts.forEach((text, k) => { if (text !== null) set(row.children[k], text); });
    meter(row.children[2], accepted || 0, "--draft");
  });
}

// One row for each of `items`, with as many cells; a sentence if there are none.
function rows(body, items, cells, none, fill) {
  if (!items.length) {
    if (none && !body.querySelector(".none")) {
      body.replaceChildren();
      make("td", "none", make("tr", "", body), none).colSpan = cells;
    }
    return;
  }
  body.querySelector(".none")?.parentNode.remove();
  while (body.children.length > items.length) body.lastChild.remove();
  items.forEach((item, i) => {
    let row = body.children[i];
    if (!row) {
      row = make("tr", "", body);
      for (let k = 0; k < cells; k++) make("td", "", row);
    }
    fill(row, item);
  });
}

function meter(cell, value, color, idle = 0) {
  cell.className = "meter";
  while (cell.children.length < 2) make("i", "", cell);
  const parts = [[value, color], [idle, "--idle"]];
  parts.forEach(([width, color], k) => {
    cell.children[k].style.width = 100 * Math.min(1, width) + "%";
    cell.children[k].style.background = `var(${color})`;
  });
}
