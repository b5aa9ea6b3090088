// SPDX-License-Identifier: MIT
// The server over time: strips, one under another, that share their time and the moment read.

import { sum, told } from "./feed.js";
import { $, ago, clock, few, key, make, nice, set, share, svg, whole } from "./parts.js";

let span = 600, cursor = null, rows = []; // those shown, of which `cursor` is a time

const per = name => s => s[name] / (s.seconds || 1);
const each = name => s => s.steps ? s[name] / s.steps : null;
const ms = name => s => s.foretold ? 1e3 * s[name] / s.foretold : null;
const over = (a, b, count) => (s, i, rows) => {
  const some = rows.slice(Math.max(0, i - count + 1), i + 1), whole = sum(some, b);
  return whole ? sum(some, a) / whole : null;
};

// A strip: its title, its unit, and its lines: name, colour, value, whether dashed. `stack`: areas
// on one another; `band`: [low, high] around the last line, and its name.
const STRIPS = [
  { title: "TPS of streams", lines: [["slowest", "--decode", s => s.lowest],
    ["median", "--draft", s => s.middle], ["highest floor", "--ink", s => s.floor, true]] },
  { title: "Streams", stack: true, show: whole, lines: [
    ["at their floor", "--decode", s => s.floored - s.below], ["below", "--bad", s => s.below],
    ["without a floor", "--idle", s => s.streams - s.floored]] },
  { title: "Output, tokens/s", stack: true, lines: [["output", "--decode", per("output")]] },
  { title: "Prefill, tokens/s", stack: true, lines: [["prefill", "--prefill", per("prefill")]] },
  { title: "Tokens a step", stack: true, lines: [["decode", "--decode", each("decode")],
    ["drafts accepted", "--draft", each("accepted")],
    ["rejected", "--idle", s => s.steps ? (s.drafted - s.accepted) / s.steps : null],
    ["prefill", "--prefill", each("prefill")]] },
  { title: "Step, ms", band: s => s.foretold ? [1 - s.error, 1 + s.error] : null, lines: [
    ["all", "--soft", s => s.steps ? 1e3 * s.busy_s / s.steps : null],
    ["where foretold: measured", "--decode", ms("measured_s")],
    ["foretold", "--prefill", ms("predicted_s"), true]] },
  { title: "Requests", stack: true, show: whole, lines: [["running", "--decode", s => s.running],
    ["waiting", "--prefill", s => s.waiting]] },
  { title: "KV cache", stack: true, most: 1, show: share, lines: [["held", "--decode", s => s.held],
    ["idle", "--idle", s => s.idle]] },
  { title: "Prompt tokens cached, of 30 s", most: 1, show: share,
    lines: [["hits", "--draft", over("hits", "queries", 30)]] },
  { title: "Drafts accepted, of 10 s", most: 1, show: share, optional: true,
    lines: [["accepted", "--draft", over("accepted", "drafted", 10)]] },
];

export function showStrips() {
  const end = told.seconds.at(-1).at;
  rows = told.seconds.filter(s => s.at > end - span);
  STRIPS.forEach((strip, i) => {
    const box = $("strips").children[i] || newStrip();
    const values = strip.lines.map(line => rows.map(line[2]));
    box.hidden = strip.optional && values.every(line => line.every(v => v === null));
    if (!box.hidden) drawStrip(box, strip, values, end);
  });
  set($("from"), ago(span) + " ago");
  set($("when"), cursor === null ? "now" : clock(rows[here()].at));
}

// The place of the moment that is read.
const here = () => cursor === null ? rows.length - 1 : rows.reduce((best, s, i) =>
  Math.abs(s.at - cursor) < Math.abs(rows[best].at - cursor) ? i : best, 0);

function newStrip() {
  const box = make("div", "strip", $("strips"));
  make("div", "head", box);
  svg("svg", box, { viewBox: "0 0 1000 100", preserveAspectRatio: "none", "aria-hidden": "true" });
  return box;
}

function drawStrip(box, strip, values, end) {
  const [head, picture] = box.children;
  const totals = rows.map((_, i) => strip.stack ? values.reduce((t, line) => t + (line[i] || 0), 0)
    : Math.max(0, ...values.map(line => line[i] || 0)));
  const peak = Math.max(1, ...totals), usual = [...totals].sort((a, b) => a - b);
  const long = 1.5 * usual[Math.floor(.95 * usual.length)];
  const most = strip.most || nice(Math.max(1, Math.min(peak, long)));
  fillHead(head, strip, values, most, peak);
  picture.replaceChildren();
  const place = { x: s => (1000 - 1000 * (end - s.at) / span).toFixed(1),
    y: v => (100 - 100 * Math.max(0, Math.min(1, v / most))).toFixed(1) };
  if (strip.band) drawBand(picture, strip, values.at(-1), place);
  if (strip.stack) drawAreas(picture, strip, values, place);
  else drawLines(picture, strip, values, place);
  if (cursor !== null) {
    const line = svg("path", picture, { d: `M${place.x(rows[here()])} 0V100`, "stroke-width": 1,
      "vector-effect": "non-scaling-stroke" });
    line.style.stroke = "var(--ink)";
  }
}

function fillHead(head, strip, values, most, peak) {
  const text = strip.show || few, i = here();
  head.replaceChildren();
  make("b", "", head, strip.title);
  strip.lines.forEach(([name, color, , dashed], k) => {
    const v = values[k][i];
    if (v !== null || !dashed) key(head, name, v === null ? "–" : text(v), color, dashed);
  });
  if (strip.band?.(rows[i])) make("span", "key", head, "± " + share(rows[i].error));
  make("span", "top-value", head, "top " + text(most)
    + (peak > 1.01 * most ? ", peak " + text(peak) : ""));
}

function drawAreas(picture, strip, values, { x, y }) {
  const under = rows.map(() => 0);
  const edge = () => rows.map((s, i) => `${x(s)},${y(under[i])}`);
  strip.lines.forEach(([, color], k) => {
    const low = edge().reverse();
    rows.forEach((_, i) => { under[i] += Math.max(0, values[k][i] || 0); });
    const area = svg("polygon", picture, { points: [...edge(), ...low].join(" ") });
    area.style.fill = `var(${color})`;
  });
}

function drawLines(picture, strip, values, { x, y }) {
  strip.lines.forEach(([, color, , dashed], k) => {
    let path = "", pen = false;
    rows.forEach((s, i) => {
      const v = values[k][i];
      if (v !== null) path += `${pen ? "L" : "M"}${x(s)} ${y(v)}`;
      pen = v !== null;
    });
    const line = svg("path", picture, { d: path || "M0 0", fill: "none",
      "vector-effect": "non-scaling-stroke", "stroke-width": dashed ? 1.2 : 1.8,
      "stroke-dasharray": dashed ? "5 4" : "none" });
    line.style.stroke = `var(${color})`;
  });
}

function drawBand(picture, strip, line, { x, y }) {
  let path = "", run = [];
  const close = () => {
    const edge = side => run.map(i => `${x(rows[i])} ${y(line[i] * strip.band(rows[i])[side])}`);
    if (run.length) path += `M${edge(1).join("L")}L${edge(0).reverse().join("L")}Z`;
    run = [];
  };
  line.forEach((v, i) => { if (v === null) close(); else run.push(i); });
  close();
  const band = svg("path", picture, { d: path || "M0 0", opacity: .25 });
  band.style.fill = "var(--prefill)";
}

export function setSpan(value) { span = value; }

export function readNow() {
  cursor = null;
  if (told.last) showStrips();
}

export function readAt(fraction) {
  if (!told.seconds.length) return;
  cursor = told.seconds.at(-1).at - span * (1 - fraction);
  showStrips();
}

// Reads the moment before or after, and says it.
export function step(by) {
  if (!rows.length) return;
  cursor = rows[Math.max(0, Math.min(rows.length - 1, here() + by))].at;
  showStrips();
  const strips = [...$("strips").children].filter(strip => !strip.hidden);
  set($("say"), strips.map(strip => strip.firstChild.textContent).join(". "));
}
