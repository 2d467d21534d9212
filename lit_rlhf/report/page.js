"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const find = (id) => document.getElementById(id);
const root = document.documentElement;
const STEP = 40; // the number of responses shown at first, and added by each "show more"
const NAMES = { advantage: "advantage", kl_to_ref: "KL to the reference, in nats", value: "value of the critic" };

// ------------------------------------------------------------------ light and dark, charts

function stored() {
  try { return localStorage.getItem("theme"); } catch { return null; } // a browser can refuse this for local files
}

async function drawCharts() {
  const theme = root.dataset.theme;
  document.querySelectorAll(".run").forEach((label) => label.style.setProperty("--run", DATA.colors[theme][label.dataset.run % 6]));
  const all = [...document.querySelectorAll(".chart")].map((box) => {
    const spec = { ...DATA.charts[box.dataset.chart], width: "container", autosize: { type: "fit-x", contains: "padding" }, datasets: { rows: DATA.rows } };
    return vegaEmbed(box, spec, { actions: false, renderer: "canvas", config: DATA.themes[theme], tooltip: { theme } });
  });
  await Promise.all(all);
  root.dataset.drawn = theme;
}

function setTheme(theme) {
  root.dataset.theme = theme;
  drawCharts();
}

const system = matchMedia("(prefers-color-scheme: dark)");
setTheme(stored() || (system.matches ? "dark" : "light"));
system.addEventListener("change", () => { if (!stored()) setTheme(system.matches ? "dark" : "light"); });
find("theme").addEventListener("click", () => {
  const theme = root.dataset.theme === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", theme); } catch { /* the choice is then not kept */ }
  setTheme(theme);
});

// ------------------------------------------------------------------ responses

const number = (x, digits = 2) => (x === null || x === undefined ? "–" : x.toFixed(digits));
const signed = (x) => (x > 0 ? "+" : "") + x.toFixed(3);

function element(kind, name, text) {
  const made = document.createElement(kind);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}

function scaleOf(kind) { // [lowest, middle, highest]; at least 95 % of the values lie between the lowest and the highest
  const values = DATA.responses.flatMap((r) => (r.tokens && r.tokens[kind]) || []).filter((x) => x !== null).sort((a, b) => a - b);
  if (!values.length) return null;
  const at = (share) => values[Math.min(values.length - 1, Math.floor(share * values.length))];
  if (kind === "value") return [at(0.025), (at(0.025) + at(0.975)) / 2, at(0.975)];
  const largest = Math.max(-at(0.025), at(0.975), 1e-4);
  return [-largest, 0, largest];
}

function colorOf(x, [low, middle, high]) {
  const share = Math.max(-1, Math.min(1, (x - middle) / Math.max(1e-9, x > middle ? high - middle : middle - low)));
  return `rgba(var(--${share > 0 ? "up" : "down"}), ${(0.7 * Math.abs(share)).toFixed(3)})`;
}

function showTokens(response, kind) {
  const box = element("span", "answer");
  if (!response.tokens) { box.textContent = response.response; return box; }
  const { text, ...numbers } = response.tokens;
  text.forEach((piece, i) => {
    const token = element("span", /^\s*<.*>$/.test(piece) ? "token special" : "token", piece);
    const facts = Object.entries(numbers).map(([name, values]) => `${NAMES[name] || name}: ${values[i] === null ? "–" : signed(values[i])}`);
    token.dataset.tip = [JSON.stringify(piece), ...facts].join("\n");
    if (numbers[kind] && numbers[kind][i] !== null) token.style.backgroundColor = colorOf(numbers[kind][i], SCALES[kind]);
    box.append(token);
  });
  if (/^\s/.test(response.response) && !/^\s/.test(text[0] || "")) box.prepend(" ");
  return box;
}

function column(caption, prompt, answer) {
  const part = element("div", "text");
  part.append(element("div", "caption", caption), element("span", "prompt", prompt), answer);
  return part;
}

function show(response, kind) {
  const card = element("article", "response"), facts = element("div", "facts"), texts = element("div", "texts");
  if (DATA.runs.length > 1) {
    const run = element("span", "run", response.run);
    run.dataset.run = DATA.runs.indexOf(response.run);
    run.style.setProperty("--run", DATA.colors[root.dataset.theme][run.dataset.run % 6]);
    facts.append(run);
  }
  const fact = (name, value, unit = "") => {
    const made = element("span", "", `${name} `);
    made.append(element("b", "", value), unit);
    facts.append(made);
  };
  fact("iteration", response.iteration.toLocaleString("en"));
  facts.append(element("span", "", response.stage === "val" ? "held-out prompt" : "training"));
  fact("score", number(response.score));
  if ("kl_to_ref" in response) fact("KL", number(response.kl_to_ref), " nats");
  fact("length", response.length, response.tokens ? " tokens" : " words");
  if (!response.terminated) facts.append(element("b", "", "truncated"));
  const rewards = Object.entries(response.rewards || {});
  if (rewards.length > 1) rewards.forEach(([name, value]) => fact(name, number(value)));
  const answer = showTokens(response, kind), reference = response.reference;
  if (reference) {
    texts.append(column(`score ${number(response.score)}, after iteration ${response.iteration}`, response.prompt, answer));
    texts.append(column(`score ${number(reference.score)}, the reference`, response.prompt, element("span", "answer", reference.response)));
  } else {
    texts.append(column("", response.prompt, answer));
  }
  card.append(facts, texts);
  return card;
}

function selected() {
  const words = find("search").value.toLowerCase(), stage = find("stage").value, run = find("run") ? find("run").value : "";
  const order = find("sort").value, sign = order.startsWith("-") ? -1 : 1, key = order.replace("-", "");
  const compare = (a, b) => (key === "prompt" ? a.prompt.localeCompare(b.prompt) : sign * ((a[key] ?? 0) - (b[key] ?? 0)));
  return DATA.responses
    .filter((r) => (!stage || r.stage === stage) && (!run || r.run === run) && (!words || r.searched.includes(words)))
    .sort((a, b) => compare(a, b) || a.iteration - b.iteration);
}

function drawLegend(kind) {
  const legend = find("legend"), scale = SCALES[kind];
  legend.hidden = !scale;
  if (!scale) return;
  const [low, bar, high, note] = legend.children, digits = scale[2] - scale[0] < 0.5 ? 3 : 2;
  low.textContent = (scale[0] < 0 ? "−" : "") + Math.abs(scale[0]).toFixed(digits);
  high.textContent = (scale[2] > 0 && kind !== "value" ? "+" : "") + scale[2].toFixed(digits);
  bar.style.background = "linear-gradient(to right, rgba(var(--down), 0.7), transparent, rgba(var(--up), 0.7))";
  const absent = kind === "kl_to_ref" ? "" : "; only training measures it";
  note.textContent = `${NAMES[kind]}, of each token${absent}`;
}

let shown = STEP;
function drawResponses() {
  const kind = find("color").value, rows = selected();
  find("list").replaceChildren(...rows.slice(0, shown).map((r) => show(r, kind)));
  find("count").textContent = `${Math.min(shown, rows.length).toLocaleString("en")} of ${rows.length.toLocaleString("en")} responses`;
  find("more").hidden = rows.length <= shown;
  drawLegend(kind);
}

const SCALES = {};
if (DATA.responses.length) {
  for (const response of DATA.responses) {
    response.length = response.tokens ? response.tokens.text.length : response.response.split(/\s+/).length;
    response.searched = `${response.prompt} ${response.response} ${response.reference ? response.reference.response : ""}`.toLowerCase();
  }
  for (const option of [...find("color").options]) {
    if (option.value) SCALES[option.value] = scaleOf(option.value);
    if (option.value && !SCALES[option.value]) option.remove();
  }
  for (const option of [...find("stage").options]) {
    if (option.value && !DATA.responses.some((r) => r.stage === option.value)) option.remove();
  }
  for (const option of [...find("sort").options]) {
    if (option.value.endsWith("kl_to_ref") && !DATA.responses.some((r) => "kl_to_ref" in r)) option.remove();
  }
  if (DATA.responses.some((r) => r.reference)) find("stage").value = "val";
  for (const id of ["search", "stage", "run", "sort", "color"]) {
    if (find(id)) find(id).addEventListener("input", () => { shown = STEP; drawResponses(); });
  }
  find("more").addEventListener("click", () => { shown += STEP; drawResponses(); });
  drawResponses();
}

const tip = find("tip");
document.addEventListener("pointerover", (event) => {
  const token = event.target.closest ? event.target.closest(".token") : null;
  tip.hidden = !token;
  if (!token) return;
  tip.textContent = token.dataset.tip;
  const box = token.getBoundingClientRect();
  tip.style.left = `${Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${box.bottom + tip.offsetHeight + 8 > innerHeight ? box.top - tip.offsetHeight - 6 : box.bottom + 6}px`;
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
