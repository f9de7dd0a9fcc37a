"use strict";
const bar = document.getElementById("live"), report = document.getElementById("report");
const [word, words] = [bar.firstElementChild, bar.lastElementChild];
const NAMES = {
  unfinished: "training", done: "done", stopped: "stopped before the end", failed: "failed",
  waiting: "waiting for the run to begin", gone: "the run was deleted",
};
const QUIET = 60;  // seconds without a word after which a run may be dead

function show(kind, name, facts) {
  bar.className = kind;
  word.textContent = name;
  words.textContent = facts.join(" · ");
}

function put(html, version) {
  // what the reader has unfolded stays unfolded, and the page does not jump
  const unfolded = [...report.querySelectorAll("details")].map((d) => [d.querySelector("summary").textContent, d.open]);
  const open = new Map(unfolded), scroll = [window.scrollX, window.scrollY];
  const boxes = [...report.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
  report.innerHTML = html;
  report.dataset.version = version;
  for (const d of report.querySelectorAll("details")) {
    const name = d.querySelector("summary").textContent;
    if (open.has(name)) d.open = open.get(name);
  }
  report.querySelectorAll(".scroll").forEach((box, i) => { box.scrollLeft = boxes[i] || 0; });
  window.scrollTo(...scroll);
}

async function look() {
  let wait = 2000;
  try {
    const state = await (await fetch("state.json")).json();
    const quiet = state.status === "unfinished" && state.quiet > QUIET;
    show(quiet ? "quiet" : state.status, quiet ? "no word for a while" : NAMES[state.status], state.figures);
    if (state.version !== report.dataset.version) {
      const answer = await fetch("report");
      const version = answer.headers.get("X-Version");
      if (version !== report.dataset.version) put(await answer.text(), version);
    }
    if (state.status !== "unfinished") wait = 5000;
  } catch (error) {
    show("lost", "stackwise watch has ended", ["this page shows what it last said"]);
    wait = 5000;
  }
  setTimeout(look, document.hidden ? 10000 : wait);
}
look();
