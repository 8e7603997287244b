"use strict";
// What the other scripts build with. Texts only ever become text nodes: no answer of a model can become markup.

const PAGE = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, text] of Object.entries(value)) node.style.setProperty(key, text);
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function el(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

// The rows of a figure as objects by column.
function records(name) {
  const { columns, rows } = PAGE.figures[name];
  return rows.map((row) => Object.fromEntries(columns.map((column, i) => [column, row[i]])));
}

function unique(values) {
  return [...new Set(values)];
}

function group(values, key) {
  const found = new Map();
  for (const value of values) {
    if (!found.has(value[key])) found.set(value[key], []);
    found.get(value[key]).push(value);
  }
  return found;
}

function number(value, digits = 1) {
  return value === null || value === undefined ? "–" : value.toFixed(digits).replace("-", "−");
}

function spread(mean, std, digits = 1) {
  return std === null || std === undefined ? number(mean, digits) : `${number(mean, digits)} ± ${number(std, digits)}`;
}

function count(value) {
  if (value === null || value === undefined) return "–";
  return value >= 1e7 ? `${(value / 1e6).toFixed(1)} M` : Math.round(value).toLocaleString("en-US");
}

// A name that may break after its underscores.
function breakable(name) {
  return name.split(/(?<=_)/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]));
}

function csv(columns, rows) {
  const cell = (value) => {
    const text = value === null || value === undefined ? "" : String(value);
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [columns, ...rows].map((row) => row.map(cell).join(",")).join("\n") + "\n";
}

function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

function csvButton(name, content) {
  return el(
    "button",
    { type: "button", class: "csv", "data-csv": name, onclick: () => download(`${name}.csv`, content()) },
    "CSV",
  );
}

function select(name, choices, onchange) {
  const options = choices.map(([value, text]) => el("option", { value }, text));
  return el("label", {}, `${name} `, el("select", { "data-filter": name.toLowerCase(), onchange }, ...options));
}

// A legend entry, or a button that hides and shows what it names.
function key(text, colour, dash = "") {
  const line = svg("line", {
    x1: 0,
    y1: 6,
    x2: 22,
    y2: 6,
    stroke: colour,
    "stroke-width": 3,
    "stroke-dasharray": dash,
  });
  return [svg("svg", { width: 22, height: 12, "aria-hidden": "true" }, line), ` ${text}`];
}

function scroll(...children) {
  return el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "scrolls sideways" }, ...children);
}
