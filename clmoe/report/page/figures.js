// One function per figure: it draws the numbers of PAGE.figures into its section.

const FIGURES = {
  comparison: drawOverview,

  scores(body) {
    const names = {
      immediate: "right after training",
      immediate_known: "right after training, task known",
      last: "at the end",
    };
    const found = group(records("scores"), "label");
    const used = unique(records("scores").map((row) => row.quantity));
    body.append(
      stackKeys(
        Object.entries(names)
          .filter(([q]) => used.includes(q))
          .map(([q, text]) => [text, q]),
      ),
    );
    for (const { label } of METHODS.filter((method) => found.has(method.label))) {
      const bars = found.get(label).map((row) =>
        scoreBar({
          name: `${label}, ${names[row.quantity]}`,
          style: row.quantity,
          mean: row.mean,
          std: row.std,
          seeds: row.seeds.split(" ").map(Number),
        }),
      );
      body.append(
        el("div", { class: "row scores" }, el("span", { class: "name" }, ...breakable(label)), el("div", {}, ...bars)),
      );
    }
  },

  matrices(body, controls) {
    const all = records("matrices");
    const seeds = unique(all.filter((row) => row.kind === "seed").map((row) => row.seeds));
    const draw = (seed) => body.replaceChildren(...matrixPanels(all, seed));
    if (seeds.length) {
      const choices = [["", "mean over seeds"], ...seeds.map((seed) => [seed, `seed ${seed}`])];
      controls.append(select("Show", choices, (event) => draw(event.target.value)));
    }
    controls.append(scale("score (%)"));
    draw("");
  },

  curves(body, controls) {
    const all = records("curves");
    const first = Math.min(...all.map((row) => row.stage), 1);
    const stages = ["no training", ...TASKS].slice(first);
    const drawn = METHODS.filter((method) => all.some((row) => row.label === method.label));
    for (const task of TASKS) {
      const own = all.filter((row) => row.task === task);
      const lines = drawn.map((method) => ({ method, points: own.filter((row) => row.label === method.label) }));
      const trained = TASKS.indexOf(task) + 1;
      const panel = curvePanel({ task, trained, stages, first, lines: lines.filter((line) => line.points.length) });
      body.append(el("figure", {}, el("figcaption", {}, task, el("small", {}, ` trained at stage ${trained}`)), panel));
    }
    controls.append(...drawn.map((method) => toggle(method, body)));
    const names = stages.map((after, i) => `${first + i} ${after}`).join(", ");
    body.after(el("p", { class: "note" }, `Score in percent against the stage, after training: ${names}.`));
  },

  outcomes(body, controls) {
    const all = records("outcomes");
    const parts = [
      ["kept", "kept"],
      ["forgotten", "forgotten"],
      ["gained", "gained"],
      ["never right", "never"],
    ];
    const bars = el("div");
    const draw = (task) => {
      const rows = METHODS.map(({ label }) => {
        const own = all.filter((row) => row.label === label && (!task || row.task === task));
        const sums = parts.map(([name, column]) => [name, column, own.reduce((sum, row) => sum + row[column], 0)]);
        const total = sums.reduce((sum, part) => sum + part[2], 0);
        if (!total) return null;
        const shown = sums.map(([name, style, n]) => [
          name,
          style,
          n,
          `${number((100 * n) / total)} % (${count(n)} of ${count(total)})`,
        ]);
        return stackRow(label, shown, total, `${number((100 * sums[1][2]) / total)} % forgotten`);
      });
      bars.replaceChildren(...rows.filter(Boolean));
    };
    const tasks = TASKS.filter((task) => all.some((row) => row.task === task));
    controls.append(
      select("Task", [["", "all tasks"], ...tasks.map((task) => [task, task])], (event) => draw(event.target.value)),
    );
    body.append(stackKeys(parts), bars);
    draw("");
  },

  locator(body) {
    const right = new Map(records("located").map((row) => [`${row.label}\n${row.decider}`, row]));
    for (const [label, rows] of group(records("locator"), "label")) {
      for (const [decider, own] of group(rows, "decider")) {
        const cells = new Map(own.map((row) => [`${row.task}\n${row.located}`, row.percent]));
        const overall = right.get(`${label}\n${decider}`);
        const cell = (task, located) => {
          const value = cells.get(`${task}\n${located}`);
          const title = `${label}, ${decider}: ${number(value)} % of the questions of ${task} taken for ${located}`;
          return { value, text: value ? number(value, value < 9.95 ? 1 : 0) : "", title, framed: task === located };
        };
        const seeds = own[0].n > 1 ? `, mean of ${own[0].n} seeds` : "";
        const caption = [
          label,
          el("small", {}, `${decider}${seeds}: ${spread(overall.mean, overall.std)} % of all questions right`),
        ];
        body.append(
          el("figure", {}, scroll(heatTable({ caption, corner: "from \\ for", rows: TASKS, columns: TASKS, cell }))),
        );
      }
    }
  },

  expansion(body) {
    for (const [label, runs] of group(records("expansion"), "label")) {
      for (const [seed, rows] of group(runs, "seed")) {
        const cells = new Map(rows.map((row) => [`${row.block}\n${row.task}`, row]));
        const top = Math.max(...rows.map((row) => row.added), 1);
        const cell = (block, task) => {
          const row = cells.get(`${block}\n${task}`);
          if (!row) return { value: null, text: "–", title: `${task}: ${block} was not probed` };
          const compared = comparison(row.probe, row.limit);
          const title = `${task}, ${block}: ${row.added} experts added; most active probe ${compared} limit`;
          return { value: (40 * row.added) / top, text: String(row.added), small: compared, title };
        };
        const total = rows.reduce((sum, row) => sum + row.added, 0);
        const share = rows.filter((row) => row.added).length / rows.length;
        const note = `seed ${seed}: ${total} experts added, ${number(100 * share)} % of the decisions extend`;
        const caption = [label, el("small", {}, note)];
        body.append(
          el(
            "figure",
            {},
            scroll(
              heatTable({
                caption,
                corner: "",
                rows: unique(rows.map((row) => row.block)).sort(byNumber),
                columns: TASKS,
                cell,
              }),
            ),
          ),
        );
      }
    }
  },

  parameters(body) {
    const cells = new Map(records("parameters").map((row) => [`${row.label}\n${row.task}`, row]));
    const rows = METHODS.map((method) => method.label).filter((label) =>
      TASKS.some((task) => cells.has(`${label}\n${task}`)),
    );
    for (const [column, caption] of [
      ["trained", "Trained in each task"],
      ["stored", "Stored after each task"],
    ]) {
      const cell = (label, task) => cells.get(`${label}\n${task}`)?.[column] ?? null;
      body.append(scroll(barTable({ caption, corner: "", rows, columns: TASKS, cell, show: count })));
    }
  },

  usage(body, controls) {
    const all = records("usage");
    const runs = unique(all.map((row) => `${row.label}, seed ${row.seed}`));
    const draw = (name) => {
      const own = all.filter((row) => `${row.label}, seed ${row.seed}` === name);
      const top = Math.max(...own.map((row) => row.share));
      const kinds = unique(own.map((row) => row.kind)).map((kind) => [kind, kind]);
      const note = el("p", { class: "note" }, `A full bar is a share of ${number(top, 2)}.`);
      body.replaceChildren(stackKeys(kinds), scroll(usageTable(own, top)), note);
    };
    controls.append(
      select(
        "Run",
        runs.map((name) => [name, name]),
        (event) => draw(event.target.value),
      ),
    );
    draw(runs[0]);
  },

  costs(body) {
    const all = records("costs");
    const works = [
      ["probes and warm-up", "probing"],
      ["training", "training"],
      ["end of task", "ending"],
      ["evaluation", "evaluation"],
    ];
    const seeds = Object.fromEntries(METHODS.map((method) => [method.label, method.seeds.length]));
    const sum = (label, passes) =>
      all.filter((row) => row.label === label && passes(row)).reduce((total, row) => total + row.seconds, 0);
    const minutes = (label, work) => sum(label, (row) => !work || row.work === work) / 60 / seeds[label];
    const drawn = METHODS.map((method) => method.label).filter((label) => minutes(label) > 0);
    const top = Math.max(...drawn.map((label) => minutes(label)));
    body.append(stackKeys(works));
    for (const label of drawn) {
      const parts = works.map(([work, style]) => [
        work,
        style,
        minutes(label, work),
        `${number(minutes(label, work))} min`,
      ]);
      const memory = peak(all.filter((row) => row.label === label));
      body.append(stackRow(label, parts, top, `${number(minutes(label))} min${memory}`));
    }
    const cell = (label, task) =>
      sum(label, (row) => row.task === task && row.work !== "evaluation") / 60 / seeds[label] || null;
    const rows = drawn.filter((label) => TASKS.some((task) => cell(label, task)));
    const caption = "Minutes to learn each task, probes and the work at its end included";
    if (rows.length) body.append(scroll(barTable({ caption, corner: "", rows, columns: TASKS, cell, show: number })));
    const logged = all.some((row) => row.peak_rss_mib !== null);
    body.append(
      el(
        "p",
        { class: "note" },
        logged
          ? "Memory: the largest peak of the process (RSS) or of its tensors on the GPU, in MiB."
          : "These runs did not log their peak memory.",
      ),
    );
  },
};

function matrixPanels(all, seed) {
  const shown = all.filter((row) => (seed ? row.seeds === seed : row.kind === "mean"));
  const panels = [];
  for (const [label, rows] of group(shown, "label")) {
    for (const [seeds, own] of group(rows, "seeds")) {
      const cells = new Map(own.map((row) => [`${row.after}\n${row.task}`, row.score]));
      const columns = unique(own.map((row) => row.task));
      const cell = (after, task) => {
        const value = cells.get(`${after}\n${task}`) ?? null;
        const title = `${label}, after ${after}: ${task} ${value === null ? "not measured" : `${number(value)} %`}`;
        return { value, text: value === null ? "·" : number(value, 0), title, framed: after === task };
      };
      const several = seeds.includes(" ");
      const ends = columns.map((task) => cells.get(`${columns.at(-1)}\n${task}`));
      const last = ends.every((value) => typeof value === "number")
        ? `, last ${number(ends.reduce((a, b) => a + b) / ends.length)}`
        : "";
      const note = (several ? `mean of ${seeds.split(" ").length} seeds` : `seed ${seeds}`) + last;
      const caption = [label, el("small", {}, note)];
      panels.push(
        el(
          "figure",
          {},
          scroll(heatTable({ caption, corner: "after", rows: unique(own.map((row) => row.after)), columns, cell })),
        ),
      );
    }
  }
  return panels;
}

function usageTable(own, top) {
  const cells = new Map();
  for (const row of own) {
    const name = `${row.block}\n${row.task}`;
    cells.set(name, [...(cells.get(name) ?? []), row]);
  }
  const blocks = unique(own.map((row) => row.block)).sort(byNumber);
  const rows = blocks.map((block) => {
    const drawn = TASKS.map((task) => {
      const shares = cells.get(`${block}\n${task}`);
      if (!shares) return el("td", {}, "–");
      const text = shares.map((row) => `${row.kind} ${row.expert}: ${number(row.share, 2)}`).join(", ");
      return el("td", {}, miniBars(shares, top, `${task}, ${block}: ${text}`));
    });
    return el("tr", {}, el("th", { scope: "row" }, block), ...drawn);
  });
  const head = TASKS.map((task) => el("th", { scope: "col" }, task));
  return el("table", { class: "usage" }, el("thead", {}, el("tr", {}, el("td"), ...head)), el("tbody", {}, ...rows));
}

function toggle(method, body) {
  const onclick = (event) => {
    const hidden = event.currentTarget.getAttribute("aria-pressed") === "true";
    event.currentTarget.setAttribute("aria-pressed", String(!hidden));
    for (const line of body.querySelectorAll("[data-label]")) {
      if (line.dataset.label === method.label) line.classList.toggle("off", hidden);
    }
  };
  return el(
    "button",
    { type: "button", class: "key", "aria-pressed": "true", onclick },
    ...key(method.label, method.colour, method.dash),
  );
}

function scale(text) {
  const steps = [0, 25, 50, 75, 100].map((value) => heatCell({ value, text: String(value), title: `${value} %` }));
  return el(
    "table",
    { class: "heat scale" },
    el("tbody", {}, el("tr", {}, el("th", { scope: "row" }, text), ...steps)),
  );
}

// ".42 > .31", with more decimals where two would show the same number.
function comparison(probe, limit) {
  const sign = probe > limit ? ">" : "≤";
  const shown = [2, 3, 4].map((digits) => [number(probe, digits), number(limit, digits)]);
  const [a, b] = shown.find(([x, y]) => x !== y) ?? shown[0];
  const short = (text) => text.replace(/^0\./, ".");
  return `${short(a)} ${sign} ${short(b)}`;
}

function peak(rows) {
  const most = (column) => Math.max(...rows.map((row) => row[column] ?? 0));
  const parts = [
    ["peak_rss_mib", "RSS"],
    ["peak_cuda_mib", "GPU"],
  ].filter(([column]) => most(column) > 0);
  return parts.map(([column, name]) => ` · ${count(most(column))} MiB ${name}`).join("");
}

function byNumber(a, b) {
  return a.localeCompare(b, "en", { numeric: true });
}
