// Sample predictions: cards by question, one line per run, and their filters.

const STEP = 8; // cards drawn at a time
const OUTCOMES = {
  forgotten: "forgotten: right then, wrong at the end",
  kept: "kept: right both times",
  gained: "gained: wrong then, right at the end",
  never: "never right",
  unknown: "asked once, or not judged alone",
};

const Samples = {
  start(section) {
    const { questions, answers, runs, totals } = PAGE.samples;
    const inPage = Object.values(totals).reduce((sum, [shown]) => sum + shown, 0);
    const asked = Object.values(totals).reduce((sum, [, all]) => sum + all, 0);
    const perTask = Math.max(...Object.values(totals).map(([shown]) => shown));
    document.getElementById("samples-note").textContent = [
      "What the models answered right after the task was trained and at the end of the sequence,",
      `the same questions for all methods. This page holds ${count(inPage)} of the ${count(asked)} test questions,`,
      `at most ${perTask} per task. A fixed rule chose them, three quarters so that each method in turn shows one that`,
      "it forgot: they are no estimate of accuracy. Located: the task that the question was taken for at the end.",
    ].join(" ");
    this.byQuestion = questions.map(() => []);
    for (const [question, run, then, now, located, outcome] of answers) {
      const [label, seed] = runs[run];
      this.byQuestion[question].push({ label, seed: String(seed), then, now, located, outcome });
    }
    this.order = this.taskByTask(questions);
    this.section = section;
    this.controls(section.querySelector(".controls"), unique(runs.map(([, seed]) => String(seed))));
    document.getElementById("more").addEventListener("click", () => this.more());
    this.filter();
  },

  // Numbers of the questions, the first of each task, then the second of each, so that the first cards show all tasks.
  taskByTask(questions) {
    const met = {};
    const places = questions.map(({ task }, i) => [(met[task] = (met[task] ?? -1) + 1), i]);
    return places.sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(([, i]) => i);
  },

  controls(box, seeds) {
    const redo = () => this.filter();
    const all = (values, text) => [["", text], ...values.map((value) => [value, value])];
    this.pick = {
      task: select("Task", all(TASKS, "all tasks"), redo),
      method: select(
        "Method",
        all(
          METHODS.map((method) => method.label),
          "all methods",
        ),
        redo,
      ),
      seed: select("Seed", [...seeds.map((seed) => [seed, seed]), ["", "all seeds"]], redo),
      outcome: select("Answers", all([], "all").concat(Object.entries(OUTCOMES)), redo),
    };
    const content = () =>
      csv(
        [
          "task",
          "question_id",
          "question",
          "reference",
          "label",
          "seed",
          "right_after",
          "right_after_correct",
          "at_end",
          "at_end_correct",
          "located",
          "outcome",
        ],
        this.lines(),
      );
    box.append(...Object.values(this.pick), csvButton("samples", content));
  },

  // Questions with the answers that pass the filters, questions without any left out.
  filter() {
    const chosen = Object.fromEntries(
      Object.entries(this.pick).map(([name, label]) => [name, label.querySelector("select").value]),
    );
    const passes = (row) =>
      (!chosen.method || row.label === chosen.method) &&
      (!chosen.seed || row.seed === chosen.seed) &&
      (!chosen.outcome || row.outcome === chosen.outcome);
    this.shown = [];
    for (const i of this.order) {
      const question = PAGE.samples.questions[i];
      const rows = !chosen.task || question.task === chosen.task ? this.byQuestion[i].filter(passes) : [];
      if (rows.length) this.shown.push([question, rows]);
    }
    const answers = this.shown.reduce((sum, [, rows]) => sum + rows.length, 0);
    const text = `${count(answers)} answers to ${count(this.shown.length)} questions match.`;
    document.getElementById("samples-count").textContent = text;
    this.section.querySelector(".body").replaceChildren();
    this.drawn = 0;
    this.more();
  },

  more() {
    const next = this.shown.slice(this.drawn, this.drawn + STEP);
    this.section.querySelector(".body").append(...next.map(([question, rows]) => this.card(question, rows)));
    this.drawn += next.length;
    const left = this.shown.length - this.drawn;
    const button = document.getElementById("more");
    button.hidden = left <= 0;
    button.textContent = `Show ${Math.min(STEP, left)} more of ${left} left`;
  },

  card(question, rows) {
    const several = unique(rows.map((row) => row.seed)).length > 1;
    const body = rows.map((row) =>
      el(
        "tr",
        { class: row.outcome },
        el("th", { scope: "row" }, ...breakable(several ? `${row.label}, seed ${row.seed}` : row.label)),
        el("td", {}, ...this.answer(row.then)),
        el("td", {}, ...this.answer(row.now)),
        el("td", { class: row.located && row.located !== question.task ? "astray" : "" }, row.located ?? "–"),
        el(
          "td",
          {},
          el("span", { class: `chip ${row.outcome}` }, row.outcome === "unknown" ? "asked once" : row.outcome),
        ),
      ),
    );
    const heads = ["Method", "Right after training", "At the end", "Located", "Outcome"].map((text) =>
      el("th", { scope: "col" }, text),
    );
    const table = el(
      "table",
      { class: "plain answers" },
      el("thead", {}, el("tr", {}, ...heads)),
      el("tbody", {}, ...body),
    );
    return el(
      "article",
      { class: "sample" },
      this.picture(question),
      el(
        "div",
        { class: "words" },
        el("p", { class: "kicker" }, `${question.task} · ${question.id}`),
        el("p", { class: "question" }, question.prompt),
        el("p", {}, "Reference: ", el("strong", {}, question.reference || "not in the predictions")),
        scroll(table),
      ),
    );
  },

  picture({ image, file, prompt }) {
    if (typeof image !== "number")
      return el("div", { class: "picture none" }, image === null ? "no image" : `${image}: ${file}`);
    return el(
      "div",
      { class: "picture" },
      el("img", { src: PAGE.samples.images[image], alt: `image of the question “${prompt}”`, title: file }),
    );
  },

  answer(given) {
    if (!given) return ["–"];
    const [text, right] = given;
    const shown = text === "" ? el("em", {}, "(empty)") : text;
    if (right === null) return [shown]; // captions: only all answers together have a score
    const mark = el(
      "span",
      { class: right ? "right" : "wrong", role: "img", "aria-label": right ? "right" : "wrong" },
      right ? "✓" : "✗",
    );
    return [mark, " ", shown];
  },

  lines() {
    return this.shown.flatMap(([question, rows]) =>
      rows.map(({ label, seed, then, now, located, outcome }) => [
        question.task,
        question.id,
        question.prompt,
        question.reference,
        label,
        seed,
        ...(then ?? ["", ""]),
        ...(now ?? ["", ""]),
        located,
        outcome,
      ]),
    );
  },
};
