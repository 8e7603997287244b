// The table of all methods, and what stands above it.

const QUANTITIES = [
  ["last", "Last", "mean of all tasks at the end (%)", 1],
  ["immediate", "Immediate", "mean right after each task’s training (%)", 1],
  ["immediate_known", "Immediate, task known", "the same with the true task given to the router (%)", 1],
  ["maa", "MAA", "mean average accuracy over the sequence (%)", 1],
  ["bwt_n_minus_1", "Backward transfer", "end minus right after training, N − 1 tasks (points)", 1],
  ["forgetting_max", "Forgetting", "best score before the end minus last score (points), less is better", 1],
  ["trainable_parameters", "Parameters trained", "in the last task", null],
  ["adapter_parameters", "Parameters stored", "at the end, frozen ones included", null],
  ["minutes", "Minutes", "wall time of training and evaluation", 1],
];
const SCORED = new Set(QUANTITIES.slice(0, 6).map(([name]) => name));

function drawOverview(body) {
  const cells = new Map(records("comparison").map((row) => [`${row.quantity}\n${row.label}`, row]));
  const shown = QUANTITIES.filter(([name]) => METHODS.some((method) => cells.has(`${name}\n${method.label}`)));
  const best = Object.fromEntries(shown.map(([name]) => [name, bestOf(name, cells)]));
  const heads = shown.map(([name, text, title]) =>
    el("th", { scope: "col", title, "aria-sort": "none" }, el("button", { type: "button", "data-sort": name }, text)),
  );
  const rows = METHODS.map((method) => {
    const values = shown.map(([name, , , digits]) => {
      const found = cells.get(`${name}\n${method.label}`);
      const bold = SCORED.has(name) && found && method.chain === "sequence" && number(found.mean) === best[name];
      const text = !found ? "–" : digits === null ? count(found.mean) : spread(found.mean, found.std, digits);
      return el("td", { "data-value": found ? found.mean : "", class: bold ? "best" : "" }, text);
    });
    const seeds = `${method.seeds.length} seed${method.seeds.length > 1 ? "s" : ""}`;
    const note = el("small", {}, [seeds, method.note].filter(Boolean).join(" · "));
    return el("tr", {}, el("th", { scope: "row" }, ...breakable(method.label), note), ...values);
  });
  const table = el(
    "table",
    { class: "plain" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Method"), ...heads)),
    el("tbody", {}, ...rows),
  );
  sortable(table);
  document.getElementById("tiles").append(...tiles(cells));
  body.append(scroll(table));
}

function bestOf(name, cells) {
  const found = METHODS.filter((method) => method.chain === "sequence").map((method) =>
    cells.get(`${name}\n${method.label}`),
  );
  const means = found.filter(Boolean).map((row) => row.mean);
  return means.length > 1 ? number(name === "forgetting_max" ? Math.min(...means) : Math.max(...means)) : null;
}

// The best of several methods that learn the tasks in sequence, by two measures, and the bound.
function tiles(cells) {
  const value = (name, method) => cells.get(`${name}\n${method.label}`);
  const leader = (name, chain) => {
    const found = METHODS.filter((method) => method.chain === chain && value(name, method));
    const compared = chain !== "sequence" || found.length > 1;
    return compared ? found.sort((a, b) => value(name, b).mean - value(name, a).mean)[0] : null;
  };
  const entries = [
    ["Highest score at the end", "last", "sequence", "%"],
    ["Least forgetting", "bwt_n_minus_1", "sequence", "points backward transfer"],
    ["Bound: all tasks at once", "last", "union", "%"],
  ];
  return entries.flatMap(([title, name, chain, unit]) => {
    const method = leader(name, chain);
    if (!method) return [];
    const { mean, std } = value(name, method);
    return [
      el(
        "div",
        { class: "tile" },
        el("span", {}, title),
        el("strong", {}, spread(mean, std)),
        el("span", {}, `${unit} · ${method.label}`),
      ),
    ];
  });
}

function sortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.slice(1).forEach((head, i) =>
    head.firstChild.addEventListener("click", () => {
      const next = { none: "descending", descending: "ascending", ascending: "none" }[head.getAttribute("aria-sort")];
      heads.slice(1).forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", next);
      const value = (row) => row.cells[i + 1].dataset.value;
      const sign = next === "ascending" ? 1 : -1;
      const order = (a, b) => (value(a) === "") - (value(b) === "") || sign * (value(a) - value(b));
      body.append(...(next === "none" ? original : [...original].sort(order)));
    }),
  );
}
