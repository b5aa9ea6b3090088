// SPDX-License-Identifier: MIT
// Small parts of the page: nodes, numbers as text. Knows nothing of the server. Texts, of which
// clients choose some, are only ever set as text.

export const $ = id => document.getElementById(id);

const number = new Intl.NumberFormat("en-US");
export const whole = v => number.format(Math.round(v));
export const few = v => v >= 100 ? whole(v) : v >= 10 ? v.toFixed(1)
  : v.toFixed(v < 1 && v > 0 ? 2 : 1);
export const share = v => v === null || isNaN(v) ? "–" : Math.round(100 * v) + "%";
// Never more than there is: what is not quite all is not 100.0%.
export const exactly = v => v === null || isNaN(v) ? "–" : (Math.floor(1000 * v) / 10).toFixed(1) + "%";
export const ago = s => s < 60 ? Math.round(s) + " s" : s < 3600 ? Math.floor(s / 60) + " min"
  : (s / 3600).toFixed(1) + " h";
export const clock = at => new Date(at * 1000).toLocaleTimeString("en-GB");

export const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };

export function make(tag, kind, parent, text) {
  const node = document.createElement(tag);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

export function svg(tag, parent, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const name in attributes) node.setAttribute(name, attributes[name]);
  parent.append(node);
  return node;
}

// The next number that people like as the end of an axis.
export function nice(v) {
  const unit = 10 ** Math.floor(Math.log10(v));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(k => k * unit >= v * .999) * unit;
}

// A word of a legend: its colour, its name, its value now.
export function key(parent, name, value, color, dashed) {
  const node = make("span", "key", parent);
  const dot = make("i", dashed ? "dashed" : "", node);
  dot.style.setProperty("--color", `var(${color})`);
  node.append(name + " ");
  make("em", "", node, value);
}
