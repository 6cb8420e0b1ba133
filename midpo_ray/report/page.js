"use strict";
// Every text of data or models goes in as a text node: nothing here parses markup.
const PAGE_SIZE = 20;
const NUMBERS = ["reward", "cost", "tokens", "gate_safety", "gate_helpfulness"];

function el(tag, options, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Nulls come last in either direction.
function compare(a, b, descending) {
  const missing = (v) => v === null || v === undefined || Number.isNaN(v);
  if (missing(a) || missing(b)) return missing(a) - missing(b);
  const order = typeof a === "string" ? a.localeCompare(b, undefined, { numeric: true }) : a - b;
  return descending ? -order : order;
}

function sortable(table) {
  const heads = [...table.querySelectorAll("th")];
  const value = (row, column) => {
    const cell = row.cells[column];
    return cell.classList.contains("number") ? parseFloat(cell.dataset.sort) : cell.dataset.sort;
  };
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const descending = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const rows = [...table.tBodies[0].rows];
    table.tBodies[0].append(...rows.sort((a, b) => compare(value(a, column), value(b, column), descending)));
  }));
}

function browse(home, { models, first, prompts, notes }) {
  const show = { query: "", set: "", category: "", prompts: "", refused: "", "sort by": "", order: "ascending", page: 0 };
  const shown = new Set(first), open = new Set();
  const body = el("div", { class: "scroll" }), pager = el("div", { class: "controls" });
  const change = (key) => (event) => { show[key] = event.target.value; show.page = 0; fill(); };
  const choice = (key, values, names = values) => values.length < 2 ? null :
    el("label", {}, `${key} `, el("select", { name: key, change: change(key) }, ...values.map((v, i) => el("option", { value: v }, names[i]))));
  const unique = (key) => [...new Set(prompts.map((p) => p[key]).filter(Boolean))].sort();

  function sortKey(p) {
    const [model, metric] = show["sort by"].split(" ");
    return metric ? (p.answers[model] || {})[metric] : p[model];
  }
  function matches(p) {
    const given = [...shown].map((i) => p.answers[i]).filter(Boolean);
    const refused = given.map((a) => a.refused === true);
    const texts = [p.prompt, ...given.map((a) => a.response)];
    return (!show.set || p.set === show.set) && (!show.category || p.category === show.category) &&
      (!show.prompts || String(p.harmful) === show.prompts) &&
      ({ some: refused.includes(true), none: !refused.includes(true), differ: new Set(refused).size > 1 }[show.refused] ?? true) &&
      (!show.query || texts.some((text) => text.toLowerCase().includes(show.query.toLowerCase())));
  }
  const chip = (text, kind = "") => el("span", { class: `chip ${kind}` }, text);
  function text(value, hidden, p) {
    if (!hidden) return el("div", { class: "text" }, value);
    return el("button", { class: "reveal", click: () => { open.add(p); fill(); } }, "Show the text, which may be harmful");
  }
  function answer(p, a) {
    if (!a) return el("td", {}, "–");
    const hidden = !open.has(p) && (p.harmful !== false || a.safe === false);
    const numbers = NUMBERS.filter((key) => key in a).map((key) => `${key.replace("_", " ")} ${a[key]}`).join(" · ");
    return el("td", {}, a.refused ? chip("refuses", "warn") : null,
      "safe" in a ? chip(a.safe ? "safe" : "unsafe", a.safe ? "good" : "bad") : null, a.joint ? chip("joint", "good") : null,
      a.malformed ? chip("malformed", "bad") : null, a.degenerate ? chip("degenerate", "bad") : null,
      a.truncated ? chip("truncated") : null,
      text(a.response, hidden, p), el("div", { class: "meta" }, numbers));
  }
  function row(p) {
    const kind = { true: chip("harmful", "bad"), false: chip("benign", "good") }[p.harmful];
    return el("tr", {}, el("td", {}, kind, p.category ? chip(p.category) : null,
      text(p.prompt, p.harmful !== false && !open.has(p), p), el("div", { class: "meta" }, `${p.set} · ${p.id}`)),
      ...[...shown].sort((a, b) => a - b).map((i) => answer(p, p.answers[i])));
  }
  function fill() {
    const rows = prompts.filter(matches), pages = Math.max(1, Math.ceil(rows.length / PAGE_SIZE));
    if (show["sort by"]) rows.sort((a, b) => compare(sortKey(a), sortKey(b), show.order === "descending"));
    const start = show.page * PAGE_SIZE;
    const heads = ["prompt", ...[...shown].sort((a, b) => a - b).map((i) => models[i])];
    body.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...heads.map((h) => el("th", {}, h)))),
      el("tbody", {}, ...rows.slice(start, start + PAGE_SIZE).map(row))));
    const turn = (name, by) => el("button", { class: name, disabled: show.page + by < 0 || show.page + by >= pages, click: () => { show.page += by; fill(); } }, name);
    pager.replaceChildren(turn("previous", -1), el("span", { class: "count" }, `page ${show.page + 1} of ${pages}, ${rows.length} of ${prompts.length} prompts`), turn("next", 1));
  }
  const tick = (model, i) => el("label", {}, el("input", { type: "checkbox", ...(shown.has(i) ? { checked: "" } : {}), change: (event) => { shown[event.target.checked ? "add" : "delete"](i); fill(); } }), ` ${model}`);
  const metrics = models.flatMap((_, i) => NUMBERS.filter((key) => prompts.some((p) => key in (p.answers[i] || {}))).map((key) => `${i} ${key}`));
  const sorts = ["", "set", "category", "prompt", ...metrics];
  const named = (sort) => sort.replace(/^(\d+) (.*)/, (_, i, key) => `${key.replace("_", " ")} of ${models[i]}`) || "as in the file";
  home.append(...notes.map((note) => el("p", { class: "note" }, note)),
    el("div", { class: "controls" }, el("input", { type: "search", placeholder: "search prompts and answers", "aria-label": "search", input: change("query") }),
      choice("set", ["", ...unique("set")], ["all", ...unique("set")]), choice("category", ["", ...unique("category")], ["all", ...unique("category")]),
      choice("prompts", ["", "true", "false", "null"], ["all", "harmful", "benign", "unknown"]),
      choice("refused", ["", "some", "none", "differ"], ["any", "by some model", "by none", "models differ"]),
      choice("sort by", sorts, sorts.map(named)), choice("order", ["ascending", "descending"]),
      el("button", { class: "reveal-all", click: () => { prompts.forEach((p) => open.add(p)); fill(); } }, "Show all texts that may be harmful")),
    el("div", { class: "controls" }, ...(models.length > 1 ? models.map(tick) : [])), pager, body);
  fill();
}

document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("section > button.reveal").forEach((button) =>
  button.addEventListener("click", () => button.replaceWith(button.nextElementSibling.content.cloneNode(true))));
document.querySelectorAll(".answers").forEach((home) => browse(home, JSON.parse(home.nextElementSibling.textContent)));
document.documentElement.dataset.ready = String(Math.round(performance.now()));
