// SPDX-License-Identifier: MIT
// What the server has told so far, and how it is asked. Loads dashboard/events and nothing else;
// draws nothing.

import { $, clock, set } from "./parts.js";

const KEPT = 3600, REACH = 30; // seconds

// `seconds`: of an hour, oldest first; `last`: the latest snapshot; `reach`: a stream's rates in
// the last half minute, by its id.
export const told = { columns: [], seconds: [], last: null, reach: new Map() };

export const sum = (rows, name) => rows.reduce((total, row) => total + row[name], 0);
export const latest = count => told.seconds.slice(-count);

const named = row => Object.fromEntries(told.columns.map((name, i) => [name, row[i]]));

function take(kind, data) {
  if (kind === "history") {
    told.columns = data.columns;
    const known = told.seconds.length ? told.seconds.at(-1).at : 0;
    told.seconds.push(...data.rows.map(named).filter(s => s.at > known));
  } else {
    data.second = named(data.second);
    told.seconds.push(data.second);
    told.last = data;
    keepReach(data.streams);
  }
  if (told.seconds.length > KEPT) told.seconds.splice(0, told.seconds.length - KEPT);
}

function keepReach(streams) {
  for (const s of streams)
    if (s.tps !== null) told.reach.set(s.id, [...told.reach.get(s.id) || [], s.tps].slice(-REACH));
  const here = new Set(streams.map(s => s.id));
  for (const id of told.reach.keys()) if (!here.has(id)) told.reach.delete(id);
}

// Follows the server for as long as the page is open; calls `news` after whatever it tells.
export async function follow(news) {
  let wait = 1;
  for (;;) {
    try {
      const key = sessionStorage.getItem("key");
      const headers = key ? { authorization: "Bearer " + key } : {};
      const reply = await fetch("dashboard/events", { headers, cache: "no-store" });
      if (reply.status === 401 || reply.status === 403) {
        await askKey(reply.status, key);
        continue;
      }
      if (!reply.ok) throw new Error("the server answers " + reply.status);
      document.body.classList.remove("gone");
      set($("link"), "");
      wait = 1;
      await read(reply.body.getReader(), news);
    } catch (error) {
      console.warn("no snapshots: " + error.message);
    }
    document.body.classList.add("gone");
    const since = told.last ? ", last heard " + clock(told.last.second.at) : "";
    set($("link"), `no connection${since}; trying again`);
    await new Promise(done => setTimeout(done, wait * 1000));
    wait = Math.min(10, wait * 2);
  }
}

async function read(reader, news) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const [, kind, data] = /^event: (.*)\ndata: (.*)$/.exec(part) || [];
      if (!kind) continue;
      take(kind, JSON.parse(data));
      news();
    }
  }
}

function askKey(status, key) {
  if (key) set($("why"), status === 403 ? "This key does not have the role admin."
    : "The server does not know this key.");
  $("ask").showModal();
  return new Promise(done => $("ask").addEventListener("close", () => {
    sessionStorage.setItem("key", $("key").value);
    $("key").value = "";
    done();
  }, { once: true }));
}
