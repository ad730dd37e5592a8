"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const views = new Map();

// ---- tables ----

/** A table's rows as objects, those that have the values of `where`. */
function rows(name, where = {}) {
  const table = DATA.tables[name], columns = Object.keys(table), found = [];
  const read = columns.map((column) => {
    const values = table[column];
    return Array.isArray(values) ? (i) => values[i] : (i) => (values.at[i] < 0 ? null : values.names[values.at[i]]);
  });
  const length = columns.length ? (table[columns[0]].at ?? table[columns[0]]).length : 0;
  for (let i = 0; i < length; i++) {
    const row = {};
    columns.forEach((column, j) => { row[column] = read[j](i); });
    if (Object.entries(where).every(([key, value]) => row[key] === value)) found.push(row);
  }
  return found;
}

/** Question and answer of a run's forget row; undefined where they are not at hand. */
const textOf = (run, row) => DATA.texts[DATA.textOf[run]]?.[row];

function texts(run, row) {
  const [question, answer] = textOf(run, row) ?? ["(not at hand)", "(not at hand)"];
  return { question, answer };
}

function csv(name) {
  const columns = Object.keys(DATA.tables[name]);
  const cell = (value) => (value === null ? "" : /[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : String(value));
  const lines = [columns, ...rows(name).map((row) => columns.map((column) => row[column]))];
  return lines.map((line) => line.map(cell).join(",")).join("\n") + "\n";
}

function download(name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([csv(name)], { type: "text/csv" }));
  link.download = `${name}.csv`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- plots ----

function theme() {
  const style = getComputedStyle(root), colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const names = ["ink", "paper", "soft", "line", "low", "mid", "high", "grey", ...[0, 1, 2, 3, 4, 5].map((i) => `run${i}`)];
  return Object.fromEntries(names.map((name) => [name, colour(name)]));
}

function config(of) {
  const text = { labelColor: of.soft, titleColor: of.soft, labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal" };
  return {
    background: null,
    font: getComputedStyle(document.body).fontFamily,
    view: { stroke: null },
    axis: { ...text, domainColor: of.grey, tickColor: of.grey, gridColor: of.line, gridOpacity: 0.7, tickSize: 4 },
    mark: { tooltip: null },
  };
}

function rowsOf(panel) {
  const found = rows(panel.table, panel.where);
  return panel.step ? found.map((row) => ({ ...row, ...texts(row.run, row.row) })) : found;
}

async function draw(id, panel, of) {
  const place = document.getElementById(id);
  const spec = JSON.parse(JSON.stringify(panel.spec).replace(/"@(\w+)"/g, (_, name) => JSON.stringify(of[name])));
  const chosen = document.querySelector(`select.step[data-figure="${id.replace(/-\d+$/, "")}"]`);
  spec.params?.forEach((param) => { if (param.name === "step") param.value = Number(chosen.value); });
  const whole = {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    width: "container",
    autosize: { type: "fit-x", contains: "padding" },
    ...spec,
    data: { values: rowsOf(panel) },
  };
  try {
    views.get(id)?.finalize();
    const options = { actions: false, renderer: "svg", config: config(of), tooltip: { theme: "custom" } };
    views.set(id, await vegaEmbed(place, whole, options));
  } catch (error) {
    place.textContent = `not drawn: ${error.message}`;
    place.classList.add("failed");
    console.error(id, error);
  }
}

async function drawAll() {
  delete root.dataset.drawn;
  const of = theme();
  for (const [id, panel] of Object.entries(DATA.panels)) await draw(id, panel, of);
  root.dataset.drawn = String(views.size);
}

function chooseStep(select) {
  for (const [id, panel] of Object.entries(DATA.panels)) {
    if (panel.step === select.dataset.figure) views.get(id)?.view.signal("step", Number(select.value)).runAsync();
  }
}

// ---- tokens ----

const SYMBOLS = { retain: "e_r", unlearn: "e_u", loss: "loss" };
const UNITS = { retain: "(nats/token)²", unlearn: "(nats/token)²", loss: "nats/token" };
const number = (value) => (value === null ? "not finite" : Number(value).toPrecision(3).replace("-", "−"));

function makeTokens() {
  const list = document.getElementById("tokens-row");
  if (!list) return;
  const all = rows("tokens"), of = new Map();
  for (const token of all) {
    const key = `${token.run}\n${token.row}\n${token.step}`;
    if (!of.has(key)) of.set(key, []);
    of.get(key).push(token);
  }
  const runs = DATA.runs.filter((run) => all.some((token) => token.run === run));
  for (const row of [...new Set(all.map((token) => token.row))].sort((a, b) => a - b)) {
    const run = runs.find((run) => textOf(run, row));
    const option = new Option(run ? `${row}: ${texts(run, row).question}` : `${row}`, row);
    list.append(option);
  }
  const show = () => showTokens(runs, of);
  for (const name of ["row", "step", "value"]) document.getElementById(`tokens-${name}`).addEventListener("change", show);
  show();
}

function showTokens(runs, of) {
  const [row, step, value] = ["row", "step", "value"].map((name) => document.getElementById(`tokens-${name}`).value);
  const place = document.getElementById("tokens-shown");
  place.replaceChildren(...runs.map((run) => tokensOf(run, row, step, value, of.get(`${run}\n${row}\n${step}`))));
}

function tokensOf(run, row, step, value, tokens) {
  const block = document.createElement("div"), head = document.createElement("p"), text = document.createElement("div");
  block.className = "tokens";
  text.className = "text";
  block.append(head, text);
  if (!tokens) {
    head.textContent = `${run}: row ${row} at step ${step} is not in the table.`;
    return block;
  }
  const values = tokens.map((token) => token[value]), finite = values.filter((one) => one !== null);
  const most = Math.max(...finite.map(Math.abs), Number.MIN_VALUE), sum = finite.reduce((a, b) => a + b, 0);
  const lost = values.length > finite.length ? ` (without ${values.length - finite.length} tokens that are not finite)` : "";
  const total = value === "loss" ? `mean loss ${number(sum / Math.max(1, finite.length))}` : `${SYMBOLS[value]} = ${number(sum)}`;
  const question = textOf(run, row) ? ` ${texts(run, row).question}` : "";
  head.textContent = `${run}, row ${row}, step ${step}, ${total} ${UNITS[value]}${lost}.${question}`;
  tokens.sort((a, b) => a.position - b.position).forEach((token, i) => text.append(tokenOf(token, values[i], value, most)));
  return block;
}

function tokenOf(token, share, value, most) {
  const one = document.createElement("span");
  one.textContent = token.token.replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
  const strength = share === null ? 0 : Math.round(80 * Math.sqrt(Math.abs(share) / most));
  const colour = value === "loss" ? "--run3" : share < 0 ? "--low" : "--high";
  one.style.background = share === null ? "var(--grey)" : `color-mix(in srgb, var(${colour}) ${strength}%, transparent)`;
  one.title = `${JSON.stringify(token.token)}: e_u ${number(token.unlearn)}, e_r ${number(token.retain)}, loss ${number(token.loss)}`;
  return one;
}

// ---- the page ----

function setTheme(name) {
  root.dataset.theme = name;
  return drawAll();
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const other = () => setTheme(root.dataset.theme === "dark" ? "light" : "dark");
  document.getElementById("theme").addEventListener("click", other);
  dark.addEventListener("change", () => setTheme(dark.matches ? "dark" : "light"));
  document.querySelectorAll("button.csv").forEach((button) => button.addEventListener("click", () => download(button.dataset.table)));
  document.querySelectorAll("select.step").forEach((select) => select.addEventListener("change", () => chooseStep(select)));
  const links = new Map([...document.querySelectorAll("nav .contents a")].map((link) => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) links.forEach((link, id) => link.classList.toggle("here", id === entry.target.id));
  }), { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main section").forEach((section) => seen.observe(section));
  makeTokens();
  return setTheme(dark.matches ? "dark" : "light");
}

start();
