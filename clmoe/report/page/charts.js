// The kinds of drawing that several figures share.

const METHODS = PAGE.about.methods.map((method, i) => ({
  ...method,
  colour: `var(--line-${i % 7})`,
  dash: ["", "6 3", "2 2"][Math.floor(i / 7) % 3],
}));
const TASKS = PAGE.about.tasks;

// A map of cells: `cell(row, column)` gives {value in percent or null, text, title, framed}.
function heatTable({ caption, corner, rows, columns, cell }) {
  const upright = columns.some((name) => name.length > 6) ? "upright" : "";
  const head = columns.map((name) => el("th", { scope: "col", class: upright }, el("span", {}, name)));
  const body = rows.map((row) =>
    el("tr", {}, el("th", { scope: "row" }, row), ...columns.map((column) => heatCell(cell(row, column)))),
  );
  return el(
    "table",
    { class: "heat" },
    el("caption", {}, el("div", { class: "caption" }, ...caption)),
    el("thead", {}, el("tr", {}, el("td", { class: "corner" }, corner), ...head)),
    el("tbody", {}, ...body),
  );
}

function heatCell({ value, text, small, title, framed }) {
  const level = value === null ? "blank" : value >= 65 ? "high" : value >= 45 ? "middle" : "low";
  const attributes = { class: `${level}${framed ? " framed" : ""}`, title };
  if (value !== null) attributes.style = { "--value": String(Math.min(Math.max(value, 0), 100)) };
  return el("td", attributes, text, small ? el("small", {}, small) : null);
}

// Cells of plain numbers with a bar behind, on one scale: `cell(row, column)` gives a number or null.
function barTable({ caption, corner, rows, columns, cell, show }) {
  const top = Math.max(...rows.flatMap((row) => columns.map((column) => cell(row, column) ?? 0))) || 1;
  const body = rows.map((row) => {
    const cells = columns.map((column) => {
      const value = cell(row, column);
      const bar = value === null ? null : el("span", { class: "bar", style: { width: `${(100 * value) / top}%` } });
      return el("td", {}, show(value), bar);
    });
    return el("tr", {}, el("th", { scope: "row" }, ...breakable(row)), ...cells);
  });
  const head = columns.map((name) => el("th", { scope: "col" }, name));
  return el(
    "table",
    { class: "bars" },
    el("caption", {}, el("div", { class: "caption" }, caption)),
    el("thead", {}, el("tr", {}, el("td", { class: "corner" }, corner), ...head)),
    el("tbody", {}, ...body),
  );
}

// One stacked horizontal bar per row: parts are [name, class, value]; `total` is the width's 100 %.
function stackRow(label, parts, total, text) {
  const bars = parts.map(([name, style, value, shown]) =>
    el("span", {
      class: `part ${style}`,
      style: { width: `${(100 * value) / total}%` },
      title: `${label}, ${name}: ${shown}`,
    }),
  );
  const spoken = `${label}: ${parts.map(([name, , , shown]) => `${name} ${shown}`).join(", ")}`;
  return el(
    "div",
    { class: "row" },
    el("span", { class: "name" }, ...breakable(label)),
    el("span", { class: "track", role: "img", "aria-label": spoken }, ...bars),
    el("span", { class: "figure" }, text),
  );
}

function stackKeys(parts) {
  return el(
    "p",
    { class: "keys" },
    ...parts.map(([name, style]) => el("span", {}, el("i", { class: `part ${style}` }), name)),
  );
}

// A bar from 0 to 100 % with the spread over seeds as a whisker and each seed as a dot.
function scoreBar({ name, style, mean, std, seeds }) {
  const low = Math.max(mean - (std ?? 0), 0);
  const high = Math.min(mean + (std ?? 0), 100);
  const dots = seeds.length > 1 ? seeds.map((value) => el("i", { class: "dot", style: { left: `${value}%` } })) : [];
  const whisker = std ? el("i", { class: "whisker", style: { left: `${low}%`, width: `${high - low}%` } }) : null;
  return el(
    "div",
    { class: "score" },
    el(
      "span",
      { class: "track", role: "img", "aria-label": `${name}: ${spread(mean, std)} percent`, title: name },
      el("span", { class: `part ${style}`, style: { width: `${mean}%` } }),
      whisker,
      ...dots,
    ),
    el("span", { class: "figure" }, spread(mean, std)),
  );
}

// One task's scores over the stages: lines is [{method, points: [{stage, mean, std}]}].
function curvePanel({ task, trained, stages, first, lines }) {
  const width = 290,
    height = 180,
    left = 30,
    right = 8,
    top = 8,
    bottom = 24;
  const last = stages.length - 1 + first;
  const x = (stage) => left + ((width - left - right) * (stage - first + 0.25)) / (last - first + 0.5);
  const y = (score) => top + (height - top - bottom) * (1 - score / 100);
  const grid = [0, 25, 50, 75, 100].flatMap((score) => [
    svg("line", { x1: left, x2: width - right, y1: y(score), y2: y(score), class: "grid" }),
    svg("text", { x: left - 5, y: y(score) + 4, "text-anchor": "end" }, String(score)),
  ]);
  const ticks = stages.map((after, i) =>
    svg(
      "text",
      { x: x(first + i), y: height - 9, "text-anchor": "middle" },
      String(first + i),
      svg("title", {}, `after ${after}`),
    ),
  );
  const mark = svg("line", { x1: x(trained), x2: x(trained), y1: top, y2: height - bottom, class: "mark" });
  const drawn = lines.map(({ method, points }) => curve(method, points, x, y, stages, first));
  const spoken = lines.map(({ method, points }) => `${method.label} ${number(points.at(-1).mean)}`).join(", ");
  return svg(
    "svg",
    { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${task}, last score in percent: ${spoken}` },
    ...grid,
    ...ticks,
    mark,
    ...drawn,
  );
}

function curve(method, points, x, y, stages, first) {
  const parts = [];
  for (const run of unbroken(points)) {
    const edge = (sign) => run.map((p) => [x(p.stage), y(Math.min(Math.max(p.mean + sign * (p.std ?? 0), 0), 100))]);
    const band = [...edge(1), ...edge(-1).reverse()];
    parts.push(svg("polygon", { points: band.join(" "), fill: method.colour, class: "band" }));
    const line = { points: run.map((p) => [x(p.stage), y(p.mean)]).join(" "), stroke: method.colour };
    parts.push(svg("polyline", { ...line, "stroke-dasharray": method.dash, class: "line" }));
  }
  for (const p of points) {
    const text = `${method.label} after ${stages[p.stage - first]}: ${spread(p.mean, p.std)} %`;
    parts.push(svg("circle", { cx: x(p.stage), cy: y(p.mean), r: 2.6, fill: method.colour }, svg("title", {}, text)));
  }
  return svg("g", { "data-label": method.label }, ...parts);
}

// Points of consecutive stages: a stage that was not measured interrupts the line.
function unbroken(points) {
  const runs = [];
  for (const point of points) {
    if (runs.length && runs.at(-1).at(-1).stage === point.stage - 1) runs.at(-1).push(point);
    else runs.push([point]);
  }
  return runs;
}

// A row of small upright bars, one per expert; `top` is the share of a full one.
function miniBars(shares, top, title) {
  const step = Math.max(5, Math.min(9, 72 / shares.length)),
    width = shares.length * step,
    height = 34;
  const bars = shares.map(({ share, kind }, i) => {
    const tall = Math.max((share / top) * (height - 1), 0.6);
    return svg("rect", { x: i * step + 0.5, y: height - tall, width: step - 1, height: tall, class: kind });
  });
  return svg(
    "svg",
    { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
    svg("title", {}, title),
    ...bars,
  );
}
