"use strict";
// Every text of data or models goes in as a text node: nothing here parses markup.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const PAGE = 20;

function el(tag, options, ...children) {
  const { cls, on, ...attributes } = options || {};
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== false) node.setAttribute(name, value);
  for (const [event, act] of Object.entries(on || {})) node.addEventListener(event, act);
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}
const section = (id) => document.getElementById(id);
const drop = (id) => {
  section(id).remove();
  document.querySelector(`nav a[href="#${id}"]`).remove();
};
const unique = (values) => [...new Set(values)];
const number = (v, share) => (v === null || v === undefined ? "–" : share ? (100 * v).toFixed(1) + "%" : Math.abs(v) >= 100 ? v.toFixed(0) : v.toFixed(2));
const choice = (label, values, act, names) =>
  el("label", {}, label + " ", el("select", { on: { change: (e) => act(e.target.value) } }, ...values.map((v, i) => el("option", { value: v }, names ? names[i] : v))));
const compare = (a, b) => {
  const none = (v) => v === null || v === undefined;
  if (none(a) || none(b)) return none(a) - none(b);
  return typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
};

// A table whose headings sort: columns are {title, of: row => sorting value, cell: row => node or text, number: bool}.
function table(columns, rows) {
  const body = el("tbody");
  const state = { column: -1, down: false };
  const heads = columns.map((c, i) =>
    el("th", { cls: (c.number ? "number " : "") + (c.of ? "by" : ""), on: c.of ? { click: () => { state.down = state.column === i ? !state.down : !!c.number; state.column = i; fill(); } } : {} }, c.title));
  function fill() {
    const c = columns[state.column];
    const sorted = c ? [...rows].sort((a, b) => { const x = c.of(a), y = c.of(b); const none = x === null || x === undefined || y === null || y === undefined; return state.down && !none ? compare(y, x) : compare(x, y); }) : rows;
    heads.forEach((h, i) => (i === state.column ? h.setAttribute("aria-sort", state.down ? "descending" : "ascending") : h.removeAttribute("aria-sort")));
    body.replaceChildren(...sorted.map((row) => el("tr", {}, ...columns.map((col) => { const made = col.cell(row); return made && made.tagName === "TD" ? made : el("td", { cls: col.number ? "number" : "" }, made); }))));
  }
  fill();
  return el("div", { cls: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body));
}
const label = (name) => {
  const model = data.models.find((m) => m.name === name);
  const dot = el("span", { cls: "dot" });
  dot.style.background = model ? model.colour : "#94a3b8";
  return el("span", {}, dot, name);
};

// --- figures ---------------------------------------------------------------------------------------------------------------
function figures() {
  if (!data.summary.length) return drop("figures");
  const home = el("div");
  const show = { set: data.summary[0].set, category: "" };
  const sets = unique(data.summary.map((r) => r.set));
  const controls = el("div", { cls: "controls" });
  function fill() {
    const lines = data.summary.filter((r) => r.set === show.set && (r.category || "") === show.category);
    const names = Object.keys(data.figures).filter((f) => lines.some((r) => r.figure === f));
    const rows = unique(lines.map((r) => r.model)).map((model) => ({ model, at: Object.fromEntries(lines.filter((r) => r.model === model).map((r) => [r.figure, r])) }));
    const best = Object.fromEntries(names.map((f) => { const values = rows.map((r) => r.at[f] && r.at[f].value).filter((v) => v !== null && v !== undefined); return [f, { high: Math.max(...values), low: Math.min(...values) }[data.figures[f].better]]; }));
    const cell = (f) => (row) => {
      const r = row.at[f];
      if (!r) return el("td", { cls: "number" }, "–");
      const share = data.figures[f].share;
      const span = r.low === null ? "" : `${number(r.low, share)} to ${number(r.high, share)}`;
      return el("td", { cls: "number" + (rows.length > 1 && r.value === best[f] ? " best" : ""), title: `${r.prompts} prompts` }, number(r.value, share), el("small", {}, span));
    };
    const columns = [{ title: "model", of: (r) => r.model, cell: (r) => label(r.model) }, ...names.map((f) => ({ title: data.figures[f].title, number: true, of: (r) => r.at[f] && r.at[f].value, cell: cell(f) }))];
    home.replaceChildren(table(columns, rows));
  }
  function choices() {
    const categories = unique(data.summary.filter((r) => r.set === show.set && r.category).map((r) => r.category)).sort();
    const kinds = el("span");
    if (categories.length) kinds.append(choice("category", ["", ...categories], (v) => { show.category = v; fill(); }, ["all", ...categories]));
    controls.replaceChildren(sets.length > 1 ? setChoice : "", kinds);
  }
  const setChoice = choice("set", sets, (v) => { show.set = v; show.category = ""; choices(); fill(); });
  choices();
  fill();
  section("figures").append(controls, home);
}

function span(row, low, high) {
  const place = (v) => 10 + (220 * (v - low)) / (high - low || 1);
  const svg = document.createElementNS(SVG, "svg");
  const draw = (tag, attributes) => { const node = document.createElementNS(SVG, tag); for (const [k, v] of Object.entries(attributes)) node.setAttribute(k, v); svg.append(node); };
  for (const [k, v] of Object.entries({ width: 240, height: 20 })) svg.setAttribute(k, v);
  const sure = row.low !== null && (row.low > row.reference || row.high < row.reference);
  const colour = !sure ? "#94a3b8" : (row.value > row.reference) === (row.better !== "low") ? "#059669" : "#dc2626";
  draw("line", { x1: place(row.reference), x2: place(row.reference), y1: 0, y2: 20, stroke: "#cbd5e1" });
  if (row.low !== null) draw("line", { x1: place(row.low), x2: place(row.high), y1: 10, y2: 10, stroke: colour, "stroke-width": 3, "stroke-linecap": "round" });
  draw("circle", { cx: place(row.value), cy: 10, r: 4.5, fill: colour });
  return svg;
}
function comparisons() {
  const rows = data.comparisons.filter((r) => r.value !== null);
  if (!rows.length) return drop("comparisons");
  const range = (reference) => { const all = rows.filter((r) => r.reference === reference).flatMap((r) => [r.value, r.low, r.high, reference]).filter((v) => v !== null); return [Math.min(...all), Math.max(...all)]; };
  const columns = [
    { title: "comparison", of: (r) => r.name, cell: (r) => r.name },
    { title: "over", of: (r) => r.over, cell: (r) => r.over },
    { title: "value", number: true, of: (r) => r.value, cell: (r) => el("td", { cls: "number" }, r.value.toFixed(3), el("small", {}, r.low === null ? "" : `${r.low.toFixed(3)} to ${r.high.toFixed(3)}`)) },
    { title: "95% interval", cell: (r) => span(r, ...range(r.reference)) },
    { title: "n", number: true, of: (r) => r.n, cell: (r) => String(r.n) },
  ];
  section("comparisons").append(el("p", { cls: "note" }, "The line stands at no difference: 0.5 for a win rate, 0 for a difference. Grey intervals include it."), table(columns, rows));
}

function capability() {
  if (!data.capability.length) return drop("capability");
  const span = (r) => (r.low === null ? "" : `${r.low.toFixed(3)} to ${r.high.toFixed(3)}`);
  const value = (r) => el("td", { cls: "number" }, r.value === null ? "–" : r.value.toFixed(3), el("small", {}, span(r)));
  const texts = ["task", "metric"].map((key) => ({ title: key, of: (r) => r[key], cell: (r) => r[key] }));
  const counts = [["n", "examples"], ["shots", "shots"]].map(([key, title]) => ({ title, number: true, of: (r) => r[key], cell: (r) => (r[key] === null ? "–" : String(r[key])) }));
  section("capability").append(table([{ title: "model", of: (r) => r.model, cell: (r) => label(r.model) }, ...texts, { title: "value", number: true, of: (r) => r.value, cell: value }, ...counts], data.capability));
}

// --- routing ---------------------------------------------------------------------------------------------------------------
const heat = (v, hue) => `hsl(${hue} 75% ${97 - 45 * v}%)`;
function example(item) {
  const home = el("div", {}, el("h3", {}, `${item.model}: ${item.title}`));
  const draw = () => {
    const parts = [["safety", 0], ["helpfulness", 173]].flatMap(([name, hue]) => {
      const layers = item[name], width = item.tokens.length;
      const canvas = el("canvas", { width, height: layers.length, title: "layers (top: the first) over tokens; deeper is nearer to 1" });
      const brush = canvas.getContext("2d");
      layers.forEach((values, l) => values.forEach((v, t) => { brush.fillStyle = heat(v, hue); brush.fillRect(t, l, 1, 1); }));
      const words = item.tokens.map((token, t) => {
        const mean = layers.reduce((sum, values) => sum + values[t], 0) / layers.length;
        const word = el("span", { title: mean.toFixed(3), cls: t >= item.prompt_tokens ? "response" : "" }, token);
        word.style.background = heat(mean, hue);
        return word;
      });
      return [el("p", { cls: "meta" }, `gate of the ${name} expert: mean over layers on each token, then layers over tokens`), el("p", { cls: "tokens" }, ...words), canvas];
    });
    home.replaceChildren(home.firstChild, ...parts);
  };
  if (item.harmful === false) draw();
  else home.append(el("button", { on: { click: draw } }, "the prompt is or may be harmful: show"));
  return home;
}
function routing() {
  if (!document.querySelector("#routing svg") && !data.examples.length) return drop("routing");
  if (data.routing.length) {
    const gate = (key) => ({ title: key[1], number: true, of: (r) => r[key[0]], cell: (r) => number(r[key[0]]) });
    const columns = [["safety_harmful", "safety gate, harmful"], ["safety_benign", "safety gate, benign"], ["helpfulness_harmful", "helpfulness gate, harmful"], ["helpfulness_benign", "helpfulness gate, benign"], ["auroc", "AUROC of their difference"], ["auroc_safety", "AUROC of the safety gate"]];
    section("routing").append(table([{ title: "model", of: (r) => r.model, cell: (r) => label(r.model) }, { title: "prompts", number: true, of: (r) => r.prompts, cell: (r) => String(r.prompts) }, ...columns.map(gate)], data.routing));
  }
  section("routing").append(...data.examples.map(example));
}

// --- answers ---------------------------------------------------------------------------------------------------------------
const METRICS = { reward: "reward", cost: "cost", tokens: "tokens", gate_safety: "safety gate", gate_helpfulness: "helpfulness gate" };
function answers() {
  const { models, prompts, notes } = data.answers;
  if (!prompts.length) return drop("answers");
  const show = { query: "", set: "", category: "", harmful: "", refused: "", sort: "", down: false, page: 0, models: new Set() };
  const first = (name) => ["base", "routed"].includes((data.models.find((m) => m.name === name) || {}).family);
  [...models.filter(first), ...models.filter((m) => !first(m))].slice(0, 3).forEach((m) => show.models.add(models.indexOf(m)));
  const open = new Set();
  const home = el("div"), pager = el("div", { cls: "controls" });
  const chosen = () => [...show.models].sort((a, b) => a - b);
  const again = (change) => (value) => { Object.assign(show, change(value), { page: 0 }); fill(); };
  const key = { "": null, set: (p) => p.set, category: (p) => p.category, prompt: (p) => p.prompt };
  const sorts = [["", "as in the file"], ["set", "set"], ["category", "category"], ["prompt", "prompt"]];
  models.forEach((m, i) => Object.entries(METRICS).forEach(([metric, name]) => {
    if (prompts.some((p) => p.answers[i] && typeof p.answers[i][metric] === "number")) {
      sorts.push([`${i} ${metric}`, `${name} of ${m}`]);
      key[`${i} ${metric}`] = (p) => (p.answers[i] ? p.answers[i][metric] : null);
    }
  }));
  function filtered() {
    const query = show.query.toLowerCase(), shown = chosen();
    const kept = prompts.filter((p) => {
      const given = shown.map((i) => p.answers[i]).filter(Boolean);
      if (show.set && p.set !== show.set) return false;
      if (show.category && p.category !== show.category) return false;
      if (show.harmful && String(p.harmful) !== show.harmful) return false;
      if (show.refused === "some" && !given.some((a) => a.refused)) return false;
      if (show.refused === "none" && given.some((a) => a.refused)) return false;
      if (show.refused === "differ" && new Set(given.map((a) => a.refused)).size < 2) return false;
      return !query || p.prompt.toLowerCase().includes(query) || given.some((a) => a.response.toLowerCase().includes(query));
    });
    const of = key[show.sort];
    return of ? kept.sort((a, b) => { const x = of(a), y = of(b); const none = x === null || x === undefined || y === null || y === undefined; return show.down && !none ? compare(y, x) : compare(x, y); }) : kept;
  }
  const chips = (a) => [
    a.refused === true ? el("span", { cls: "chip warn" }, "refuses") : null,
    a.safe === true ? el("span", { cls: "chip good" }, "safe") : a.safe === false ? el("span", { cls: "chip bad" }, "unsafe") : null,
    a.joint === true ? el("span", { cls: "chip good" }, "joint") : null,
    a.malformed === true ? el("span", { cls: "chip bad" }, "malformed") : null,
    a.truncated === true ? el("span", { cls: "chip" }, "truncated") : null,
  ];
  function answer(a, hidden, reveal) {
    if (!a) return el("td", {}, "–");
    const numbers = Object.entries(METRICS).filter(([m]) => typeof a[m] === "number").map(([m, name]) => `${name} ${m === "tokens" ? a[m] : a[m].toFixed(2)}`).join(" · ");
    return el("td", {}, ...chips(a), hidden ? el("div", {}, el("button", { on: { click: reveal } }, "hidden: show")) : el("div", { cls: "text" }, a.response), el("div", { cls: "meta" }, numbers));
  }
  function row(p) {
    const hide = (a) => !open.has(p) && (p.harmful !== false || (a && a.safe === false));
    const reveal = () => { open.add(p); fill(); };
    const kind = p.harmful === null ? null : el("span", { cls: "chip " + (p.harmful ? "bad" : "good") }, p.harmful ? "harmful" : "benign");
    const head = el("td", {}, kind, p.category ? el("span", { cls: "chip" }, p.category) : null,
      hide() ? el("div", {}, el("button", { cls: "reveal", on: { click: reveal } }, "hidden: show")) : el("div", { cls: "text" }, p.prompt), el("div", { cls: "meta" }, `${p.set} · ${p.id}`));
    return el("tr", {}, head, ...chosen().map((i) => answer(p.answers[i], hide(p.answers[i]), reveal)));
  }
  function by(sort) {
    show.down = show.sort === sort ? !show.down : false;
    Object.assign(show, { sort, page: 0 });
    sortChoice.querySelector("select").value = sort;
    fill();
  }
  function fill() {
    const rows = filtered(), pages = Math.max(1, Math.ceil(rows.length / PAGE));
    show.page = Math.min(show.page, pages - 1);
    const metric = (i) => (sorts.find(([s]) => s.startsWith(`${i} `)) || [""])[0];
    const mark = (sort) => (sort && show.sort === sort ? { "aria-sort": show.down ? "descending" : "ascending" } : {});
    const heads = [el("th", { cls: "by", ...mark("prompt"), on: { click: () => by("prompt") } }, "prompt"),
      ...chosen().map((i) => el("th", { cls: "by", ...mark(metric(i)), title: `sort by ${METRICS[metric(i).split(" ")[1]] || "-"}`, on: { click: () => by(metric(i)) } }, label(models[i])))];
    home.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows.slice(show.page * PAGE, (show.page + 1) * PAGE).map(row))));
    const turn = (name, by, off) => el("button", { disabled: off ? "" : undefined, on: { click: () => { show.page += by; fill(); } } }, name);
    pager.replaceChildren(turn("◀ back", -1, show.page === 0), el("span", { id: "count" }, `page ${show.page + 1} of ${pages}, ${rows.length} of ${prompts.length} prompts`), turn("on ▶", 1, show.page === pages - 1));
  }
  const sets = unique(prompts.map((p) => p.set)), categories = unique(prompts.map((p) => p.category)).filter(Boolean).sort();
  const sortChoice = choice("sort by", sorts.map((s) => s[0]), again((sort) => ({ sort, down: false })), sorts.map((s) => s[1]));
  const shownModels = models.length > 1 ? models.map((m, i) => {
    const box = el("input", { type: "checkbox", on: { change: (e) => { e.target.checked ? show.models.add(i) : show.models.delete(i); fill(); } } });
    box.checked = show.models.has(i);
    return el("label", {}, box, " ", label(m));
  }) : [];
  section("answers").append(
    ...notes.map((n) => el("p", { cls: "note" }, n)),
    el("div", { cls: "controls" },
      el("input", { type: "search", placeholder: "search prompts and answers", "aria-label": "search", on: { input: (e) => again((query) => ({ query }))(e.target.value) } }),
      sets.length > 1 ? choice("set", ["", ...sets], again((set) => ({ set })), ["all", ...sets]) : null,
      categories.length > 1 ? choice("category", ["", ...categories], again((category) => ({ category })), ["all", ...categories]) : null,
      choice("prompts", ["", "true", "false", "null"], again((harmful) => ({ harmful })), ["all", "harmful", "benign", "unknown"]),
      choice("refused", ["", "some", "none", "differ"], again((refused) => ({ refused })), ["any", "by some model", "by none", "models differ"]),
      sortChoice, el("button", { on: { click: () => by(show.sort) } }, "⇅"),
      el("button", { id: "reveal", on: { click: () => { prompts.forEach((p) => open.add(p)); fill(); } } }, "show all harmful text")),
    el("div", { cls: "controls" }, ...shownModels), pager, home);
  fill();
}

function about() {
  const row = ([name, text]) => el("tr", {}, el("th", {}, name), el("td", {}, el("pre", {}, text)));
  section("about").append(el("table", {}, el("tbody", {}, ...Object.entries(data.about).map(row))));
}

for (const id of ["picture", "training"]) if (!document.querySelector(`#${id} svg`)) drop(id);
figures();
comparisons();
capability();
routing();
answers();
about();
document.documentElement.dataset.ready = String(Math.round(performance.now()));
