// The console: asks, shows the answer as it comes, browses the history, draws /metrics. Asks no other host than its own;
// whatever came over the wire goes onto the page as text, never as HTML. Addresses are relative, so a path prefix works.
"use strict";

const $ = (id) => document.getElementById(id);

function make(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const seconds = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10000 ? 2 : 1)} s`);
const plain = (n) => (n >= 99.5 || Number.isInteger(n) ? Math.round(n).toLocaleString("en") : n.toPrecision(2));

// --- Key ------------------------------------------------------------------------------------------------------------

const key = $("key");
try {
  key.value = sessionStorage.getItem("key") ?? "";
} catch { /* A browser that keeps nothing: the key lives in the field. */ }
key.addEventListener("input", () => {
  try {
    sessionStorage.setItem("key", key.value);
  } catch { /* the same */ }
});
key.addEventListener("change", () => loadHistory());

// --- Calls and what can go wrong --------------------------------------------------------------------------------------

class Problem extends Error {
  constructor(title, message, code, trace) {
    super(message);
    Object.assign(this, { title, code, trace });
  }
}

const TITLES = {
  invalid_request: "The server does not take this",
  upstream_rejected: "The LLM refused this question",
  rate_limited: "This key has asked too often",
  upstream_rate_limited: "The LLM is asked too often",
  upstream_error: "The LLM failed",
  upstream_bad_answer: "The LLM sent something that is no answer",
  upstream_unavailable: "The LLM cannot be reached",
  upstream_timeout: "The LLM took too long",
  overloaded: "The server is busy",
  shutting_down: "The server is shutting down",
  history_unavailable: "The history cannot be written",
  body_too_large: "The question is too large",
};

function problemFrom(error, status, retryAfter) {
  const { message = "no further words", code, param, request_id: id } = error ?? {};
  const trace = [status && `HTTP ${status}`, code, param && `field ${param}`, id && `request ${id}`].filter(Boolean).join(" · ");
  if (status === 401) {
    const title = key.value ? "The server does not accept this key" : "This server wants a key";
    return new Problem(title, "Enter one of the server's API_KEYS in the field “API key” at the top, then send again.", code, trace);
  }
  const wait = /^\d+$/.test(retryAfter ?? "") ? ` Try again in ${retryAfter} s.` : "";
  return new Problem(TITLES[code] ?? `The server answered ${status ?? "with an error"}`, message + wait, code, trace);
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  const secret = key.value.trim();
  if (/[^\x20-\x7e]/.test(secret)) {
    throw new Problem("This cannot be a key", "The field “API key” has characters that no key can have.", "unauthorized");
  }
  if (secret) headers.Authorization = `Bearer ${secret}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new Problem("The server cannot be reached", "It does not answer, or the network is down. Try again in a moment.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw problemFrom(body?.error, response.status, response.headers.get("Retry-After"));
}

function showProblem(problem) {
  const box = $("problem");
  box.replaceChildren(make("strong", "", problem.title ?? "This page failed"), make("p", "", problem.message));
  if (problem.trace) box.append(make("p", "quiet-text", problem.trace));
  box.hidden = false;
  if (problem.code === "unauthorized") key.focus();
}

// --- Asking -----------------------------------------------------------------------------------------------------------

let running = null;
let latest = null;

/** The request's body as the form says; throws a Problem that names the field. */
function questionFromForm() {
  const body = { question: $("question").value };
  const refuse = (id, words) => {
    if (id !== "question") $("form").querySelector("details").open = true;
    $(id).focus();
    throw new Problem("Not sent", words);
  };
  if (!body.question.trim()) refuse("question", "Type a question first.");
  for (const id of ["model", "system"]) {
    if ($(id).value.trim()) body[id] = $(id).value;
  }
  for (const id of ["temperature", "max_tokens"]) {
    const field = $(id);
    if (!field.validity.valid) refuse(id, field.validationMessage);
    if (field.value !== "") body[id] = field.valueAsNumber;
  }
  return body;
}

/** The data of each event of an SSE body, as it comes. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    // The server ends its lines with LF alone, whatever the LLM does.
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) yield data.join("\n");
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  }
}

async function readStream(response, run) {
  let done = false;
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") {
      done = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw problemFrom(chunk.error);
    for (const choice of chunk.choices ?? []) {
      const text = choice.delta?.content || choice.delta?.refusal;
      if (choice.index || typeof text !== "string") continue;
      run.last = performance.now();
      run.first ??= run.last;
      run.pieces += 1;
      run.text.appendData(text);
    }
    run.reason = chunk.choices?.[0]?.finish_reason ?? run.reason;
    showFacts(run);
  }
  if (!done) throw new Problem("The stream broke off", "What had arrived is kept in the history.");
}

function showFacts(run) {
  const now = run.ended ?? performance.now();
  const tokens = run.usage?.completion_tokens ?? run.pieces;
  const writing = run.last - run.first;
  // Where everything came at once, the speed is that of the whole call.
  const speed = run.pieces > 1 && writing > 20 ? (tokens - 1) / writing : tokens / (now - run.began);
  $("fact-first").textContent = run.first ? seconds(run.first - run.began) : "–";
  $("fact-speed").textContent = tokens ? `${plain(speed * 1000)} tokens/s` : "–";
  $("fact-total").textContent = seconds(now - run.began);
  $("fact-tokens").textContent = run.usage ? `${tokens} (prompt ${run.usage.prompt_tokens})` : tokens ? `about ${tokens}` : "–";
}

function setRunning(run) {
  running = run;
  latest = run ?? latest;
  $("stop").hidden = !run;
  // A button that is disabled loses the focus.
  if (run && ["stream", "whole"].includes(document.activeElement.id)) {
    run.asked = document.activeElement;
    $("stop").focus({ preventScroll: true });
  }
  for (const id of ["stream", "whole"]) $(id).disabled = Boolean(run);
  $("answer").setAttribute("aria-busy", String(Boolean(run)));
}

async function ask(streaming) {
  if (running) return;
  $("problem").hidden = true;
  let body;
  try {
    body = questionFromForm();
  } catch (e) {
    return showProblem(e);
  }
  const run = { began: performance.now(), first: null, last: null, pieces: 0, text: document.createTextNode("") };
  run.abort = new AbortController();
  run.after = newest;
  $("answer").replaceChildren(run.text);
  $("outcome").textContent = streaming ? "Waiting for the first token…" : "Waiting for the answer…";
  $("result").hidden = false;
  setRunning(run);
  showFacts(run);
  const ticking = setInterval(() => showFacts(run), 100);
  let outcome = "";
  try {
    const response = await call(streaming ? "api/streaming" : "api/ask", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      signal: run.abort.signal,
    });
    if (streaming) {
      $("outcome").textContent = "Streaming…";
      await readStream(response, run);
    } else {
      const pair = await response.json();
      run.text.appendData(pair.answer);
      Object.assign(run, { usage: pair.usage, reason: pair.finish_reason, model: pair.model, id: pair.id });
    }
  } catch (e) {
    const stopped = run.abort.signal.aborted;
    outcome = stopped ? "Stopped." : "";
    const broken = new Problem("The connection broke off", "What had arrived may be in the history.");
    if (!stopped) showProblem(e.name === "TypeError" ? broken : e);
    if (!run.text.length) $("result").hidden = !stopped;
  }
  clearInterval(ticking);
  run.ended = performance.now();
  const focused = document.activeElement === $("stop");
  setRunning(null);
  if (focused) (run.asked ?? $("question")).focus({ preventScroll: true });
  $("outcome").textContent = outcome;
  // A stream cut short is stored when the server has noticed, which may take a second.
  if (outcome) await new Promise((resolve) => setTimeout(resolve, 1200));
  const kept = run.id ? null : await keptPair(body.question, run.text.data, run.after);
  if (kept) Object.assign(run, { usage: kept.usage, model: kept.model, id: kept.id });
  loadHistory();
  if (latest !== run) return;
  showFacts(run);
  const words = [run.id && `Number ${run.id} in the history`, run.model, run.reason && `finish reason ${run.reason}`];
  $("outcome").textContent = [outcome, words.filter(Boolean).join(" · ")].filter(Boolean).join(" ");
  sample();
}

$("form").addEventListener("submit", (e) => {
  e.preventDefault();
  ask(true);
});
$("whole").addEventListener("click", () => ask(false));
$("stop").addEventListener("click", () => running?.abort.abort());
// The key that asked may still be held.
$("stop").addEventListener("keydown", (e) => e.repeat && e.preventDefault());
addEventListener("keydown", (e) => {
  // There it clears the field, or ends an input method's choice.
  if (e.key === "Escape" && !e.isComposing && e.target !== $("search")) running?.abort.abort();
});
$("form").addEventListener("keydown", (e) => {
  if (e.key !== "Enter" || !(e.ctrlKey || e.metaKey)) return;
  e.preventDefault();
  ask(true);
});

// --- History ------------------------------------------------------------------------------------------------------------

const PAGE = 15;
let looking = 0;
let before = null;
/** The highest number seen so far. */
let newest = 0;

/** The pair of a stream that has ended, which came after that number; null where it is not there. Calls of tools follow its text. */
async function keptPair(question, answer, after) {
  try {
    const { items } = await (await call(`api/history?limit=${PAGE}`)).json();
    return items.find((pair) => pair.id > after && pair.question === question && pair.answer.startsWith(answer)) ?? null;
  } catch {
    return null;
  }
}

/** Shows the newest pairs or the best matches, or adds older ones. */
async function loadHistory(older = false) {
  const turn = ++looking;
  const words = $("search").value.trim();
  const query = new URLSearchParams({ limit: PAGE });
  if (words) query.set("q", words);
  if (older) query.set("before", before);
  let page;
  try {
    page = await (await call(`api/history?${query}`)).json();
  } catch (e) {
    if (turn !== looking) return;
    if (!older) $("pairs").replaceChildren();
    $("older").hidden = !older;
    $("history-note").textContent = e.code === "unauthorized"
      ? key.value ? "The server does not accept this key." : "Enter your key at the top to see its history."
      : `${e.title ?? "This page failed"}. ${e.message}`;
    return;
  }
  if (turn !== looking) return;
  before = page.next_before;
  newest = Math.max(newest, ...page.items.map((pair) => pair.id));
  const open = new Set(Array.from($("pairs").querySelectorAll("details[open]"), (details) => details.dataset.id));
  if (!older) $("pairs").replaceChildren();
  $("pairs").append(...page.items.map((pair) => row(pair, open.has(String(pair.id)))));
  $("older").hidden = before === null;
  const found = page.items.length;
  $("history-note").textContent = words
    ? found ? `${found === PAGE ? "The best" : found} ${found === 1 ? "match" : "matches"}, best first` : "Nothing found."
    : $("pairs").children.length ? "" : "Nothing has been asked yet.";
}

function row(pair, open) {
  const details = make("details");
  details.dataset.id = pair.id;
  const summary = make("summary");
  const asked = make("span", "asked", pair.question.slice(0, 400));
  asked.dir = "auto";
  const meta = make("span", "meta");
  const at = make("time", "", when(pair.created_at));
  at.dateTime = pair.created_at;
  const odd = pair.finish_reason && pair.finish_reason !== "stop" ? pair.finish_reason : null;
  const rest = [pair.model, seconds(pair.latency_ms), pair.usage && `${pair.usage.total_tokens} tokens`, odd];
  meta.append(at, ` · ${rest.filter(Boolean).join(" · ")}`);
  summary.append(asked, meta);
  details.append(summary);
  details.addEventListener("toggle", () => {
    if (details.children.length === 1) details.append(whole(pair));
  });
  const item = make("li");
  item.append(details);
  details.open = open;
  return item;
}

function whole(pair) {
  const box = make("div", "pair");
  for (const [name, words] of [["Question", pair.question], ["Answer", pair.answer]]) {
    const text = make("div", "text", words);
    text.dir = "auto";
    text.tabIndex = 0;
    text.setAttribute("role", "region");
    text.setAttribute("aria-label", name);
    box.append(make("h3", "", name), text);
  }
  const again = make("button", "", "Ask again");
  again.type = "button";
  again.addEventListener("click", () => {
    $("question").value = pair.question;
    $("question").focus();
  });
  box.append(again);
  return box;
}

function when(text) {
  const at = new Date(text);
  const today = at.toDateString() === new Date().toDateString();
  return today ? at.toLocaleTimeString() : at.toLocaleString([], { dateStyle: "medium", timeStyle: "short" });
}

let typing;
$("search").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(loadHistory, 250);
});
$("older").addEventListener("click", () => loadHistory(true));

// --- The last minutes ----------------------------------------------------------------------------------------------------

const EVERY = 5000;
/** How far back the charts go, at least and at most. */
const LEAST = 60000;
const MOST = 300000;
/** Routes that are not what the service is for. */
const ASIDE = /metrics|livez|readyz|page/;
/** Routes that ask the LLM. */
const ANSWERS = /ask|stream|chat/;

/** Prometheus text as [name, labels, value]. */
function parseMetrics(text) {
  const parsed = [];
  for (const line of text.split("\n")) {
    const found = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)/.exec(line);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) labels[name] = value;
    parsed.push([found[1], labels, Number(found[3].replace("Inf", "Infinity"))]);
  }
  return parsed;
}

/** What the charts need of one look at the metrics. */
function digest(metrics) {
  const sum = (name, wanted = () => true) =>
    metrics.reduce((total, [n, labels, value]) => (n === `ai_proxy_${name}` && wanted(labels) ? total + value : total), 0);
  const buckets = (name, wanted = () => true) => {
    const counts = new Map();
    for (const [n, labels, value] of metrics) {
      if (n !== `ai_proxy_${name}_bucket` || !wanted(labels)) continue;
      const bound = Number(labels.le.replace("Inf", "Infinity"));
      counts.set(bound, (counts.get(bound) ?? 0) + value);
    }
    return counts;
  };
  const status = (first) => ({ route = "", status = "" }) => !ASIDE.test(route) && status.startsWith(first);
  const resident = metrics.find(([name]) => name === "process_resident_memory_bytes");
  return {
    time: Date.now(),
    up: sum("uptime_seconds"),
    requests: sum("requests_total", status("")),
    refused: sum("requests_total", status("4")),
    failed: sum("requests_total", status("5")),
    latency: buckets("request_duration_seconds", ({ route = "" }) => ANSWERS.test(route)),
    first: buckets("time_to_first_token_seconds"),
    sum,
    memory: resident?.[2],
  };
}

/** The quantile of what was counted between two looks, in seconds, as Prometheus reckons it; null where nothing was. */
function quantile(q, older, newer) {
  const bounds = [...newer.keys()].sort((a, b) => a - b);
  const counts = bounds.map((bound) => newer.get(bound) - (older?.get(bound) ?? 0));
  const total = counts.at(-1);
  if (!(total > 0)) return null;
  const at = counts.findIndex((count) => count >= q * total);
  const low = at > 0 ? bounds[at - 1] : 0;
  if (bounds[at] === Infinity) return low;
  const below = at > 0 ? counts[at - 1] : 0;
  return low + ((bounds[at] - low) * (q * total - below)) / (counts[at] - below || 1);
}

const looks = [];
const points = [];

async function sample() {
  clearTimeout(sample.next);
  if (document.hidden) return;
  // The clock was put back.
  if (looks.at(-1)?.time > Date.now()) looks.length = points.length = 0;
  // Two looks in quick succession would make a peak of one request.
  const soon = EVERY / 2 - (Date.now() - (looks.at(-1)?.time ?? 0));
  sample.next = setTimeout(sample, soon > 0 ? soon : EVERY);
  if (soon > 0) return;
  let look;
  try {
    const response = await fetch("metrics", { cache: "no-store", signal: AbortSignal.timeout(EVERY) });
    if (!response.ok) throw new Error(`/metrics answered ${response.status}`);
    look = digest(parseMetrics(await response.text()));
  } catch (e) {
    $("minutes-note").textContent = `No numbers: ${["TypeError", "TimeoutError"].includes(e.name) ? "the server cannot be reached" : e.message}.`;
    return showState();
  }
  $("minutes-note").textContent = "Counted since this page was opened. Pages, metrics and health probes are left out.";
  const last = looks.at(-1);
  if (last && look.time <= last.time) return;
  if (last && look.up >= last.up) {
    const rate = (name) => (Math.max(0, look[name] - last[name]) * 1000) / (look.time - last.time);
    points.push({
      time: look.time,
      requests: rate("requests"),
      refused: rate("refused"),
      failed: rate("failed"),
      p50: quantile(0.5, last.latency, look.latency),
      p95: quantile(0.95, last.latency, look.latency),
    });
  } else if (last) {
    looks.length = 0; // It has been started anew: its counters too.
  }
  looks.push(look);
  while (looks[0].time < look.time - MOST) looks.shift();
  while (points.length && points[0].time < look.time - MOST) points.shift();
  showFigures(look);
  drawAll();
}

function showFigures(look) {
  const value = (name) => plain(look.sum(name));
  const first = quantile(0.5, looks[0] === look ? null : looks[0].first, look.first);
  const figures = [
    ["In flight", value("requests_in_flight")],
    ["Workers busy", `${value("workers_busy")} of ${value("workers")}`],
    ["In the queue", value("queue_length")],
    ["Connections", value("connections")],
    ["First token p50", first === null ? "–" : seconds(first * 1000)],
    ["Tokens so far", value("tokens_total")],
    ["Retries so far", value("upstream_retries_total")],
    ["Memory", look.memory ? `${plain(look.memory / 1048576)} MiB` : "–"],
    ["Up for", duration(look.up)],
  ];
  $("figures").replaceChildren(...figures.map(([name, words]) => {
    const box = make("div");
    box.append(make("dt", "", name), make("dd", "", words));
    return box;
  }));
}

function duration(s) {
  const [d, h, m] = [Math.floor(s / 86400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  return d ? `${d} d ${h} h` : h ? `${h} h ${m} min` : m ? `${m} min` : `${Math.floor(s)} s`;
}

const latency = (s) => seconds(s * 1000);
const tick = (s) => (s === 0 ? "0" : s < 1 ? `${+(s * 1000).toPrecision(3)} ms` : `${+s.toPrecision(3)} s`);
const CHARTS = [
  ["chart-requests", plain, String, 1, [["requests", "all"]]],
  ["chart-errors", plain, String, 1, [["refused", "4xx"], ["failed", "5xx"]]],
  ["chart-latency", latency, tick, 0.1, [["p50", "p50"], ["p95", "p95"]]],
];
let pointed = null;

/** The time of the last look, and how far back the charts go from there. */
function span() {
  const now = looks.at(-1)?.time ?? Date.now();
  return [now, Math.min(MOST, Math.max(LEAST, now - (looks[0]?.time ?? now)))];
}

function drawAll() {
  for (const chart of CHARTS) draw(...chart);
}

function shape(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

/** The next of 1, 2, 5, 10, ... that is not below. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((step) => step * power >= value * 0.999);
}

function draw(id, format, scale, least, series) {
  const figure = $(id);
  let svg = figure.querySelector("svg");
  if (!svg) {
    svg = shape("svg", { role: "img" });
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerleave", point);
    figure.append(make("div", "legend"), svg);
  }
  const [width, height, left, bottom] = [svg.clientWidth || 300, svg.clientHeight || 144, 52, 18];
  const [now, back] = span();
  const values = points.flatMap((p) => series.map(([name]) => p[name]).filter((v) => v !== null));
  const top = ceiling(Math.max(least, ...values));
  const x = (time) => left + (width - left - 4) * (1 - (now - time) / back);
  const y = (value) => 8 + (height - bottom - 8) * (1 - value / top);
  const shapes = [];
  for (const part of [0, 0.5, 1]) {
    const at = y(part * top);
    shapes.push(shape("line", { class: "grid", x1: left, x2: width, y1: at, y2: at }));
    shapes.push(shape("text", { x: left - 6, y: at + 4, "text-anchor": "end" }, scale(part * top)));
  }
  const start = back < 90000 ? `${Math.round(back / 1000)} s ago` : `${+(back / 60000).toFixed(1)} min ago`;
  shapes.push(shape("text", { x: left, y: height - 3 }, start), shape("text", { x: width, y: height - 3, "text-anchor": "end" }, "now"));
  const shown = points[pointed] ?? points.at(-1);
  if (points[pointed]) shapes.push(shape("line", { class: "now", x1: x(shown.time), x2: x(shown.time), y1: 8, y2: height - bottom }));
  const legend = [];
  series.forEach(([name, title], index) => {
    const colour = index ? " two" : "";
    let path = "";
    points.forEach((p, i) => {
      if (p[name] === null) return;
      const joined = i > 0 && points[i - 1][name] !== null;
      const alone = !joined && !(points[i + 1] && points[i + 1][name] !== null);
      path += `${joined ? "L" : "M"}${x(p.time).toFixed(1)} ${y(p[name]).toFixed(1)}`;
      if (alone || p === points[pointed]) shapes.push(shape("circle", { class: `dot${colour}`, cx: x(p.time), cy: y(p[name]), r: 2.5 }));
    });
    if (path) shapes.push(shape("path", { class: `curve${colour}`, d: path }));
    const latest = shown && shown[name] !== null ? format(shown[name]) : "–";
    legend.push(make("span", colour.trim(), `${title} ${latest}`));
  });
  const ago = points[pointed] ? `${Math.round((now - shown.time) / 1000)} s ago` : null;
  if (ago) legend.push(make("small", "", ago));
  figure.querySelector(".legend").replaceChildren(...legend);
  svg.setAttribute("aria-label", `${figure.querySelector("figcaption").textContent}: ${legend.map((l) => l.textContent).join(", ")}`);
  svg.replaceChildren(...shapes);
}

function point(e) {
  const box = e.currentTarget.getBoundingClientRect();
  const [now, back] = span();
  const at = now - back * (1 - (e.clientX - box.left - 52) / (box.width - 56));
  pointed = null;
  if (e.type === "pointermove" && points.length) {
    const far = points.map((p) => Math.abs(p.time - at));
    const nearest = far.indexOf(Math.min(...far));
    if (far[nearest] < 4 * EVERY) pointed = nearest;
  }
  drawAll();
}

addEventListener("resize", drawAll);
document.addEventListener("visibilitychange", sample);

// --- The server's state ----------------------------------------------------------------------------------------------------

async function showState() {
  clearTimeout(showState.next);
  showState.next = setTimeout(showState, 3 * EVERY);
  if (document.hidden) return;
  let [words, good] = ["cannot be reached", false];
  try {
    const state = await (await fetch("readyz", { cache: "no-store", signal: AbortSignal.timeout(EVERY) })).json();
    const mode = state.mode === "mock" ? "mock mode: answers are made up" : "";
    const history = state.history === "ok" ? "" : `history ${state.history}`;
    words = [state.status, history, mode, `version ${state.version}`].filter(Boolean).join(" · ");
    good = state.status === "ready";
  } catch { /* said by the words above */ }
  const place = $("state");
  if (place.textContent !== words) place.textContent = words;
  const isBack = good && place.className === "bad";
  place.className = good ? "good" : "bad";
  if (isBack) loadHistory();
}

showState();
loadHistory();
drawAll();
sample();
