// Puts the page together: title, theme, sections with what was measured, navigation.

function summary() {
  const { benchmark, scoring, orders, steps, limit, methods, tasks } = PAGE.about;
  const runs = methods.reduce((sum, method) => sum + method.seeds.length, 0);
  const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  document.getElementById("title").textContent = benchmark;
  const order =
    orders.length === 1 ? orders[0].join(" → ") : `${orders.length} different orders, first ${orders[0].join(" → ")}`;
  document.getElementById("summary").textContent =
    `${plural(methods.length, "method")}, ${plural(runs, "run")}, ${plural(tasks.length, "task")}: ${order}. ` +
    `Scoring mode “${scoring}”, ${steps.length ? steps.join(" or ") : "no"} training steps per task.` +
    (limit && ` ${limit}`);
  document.getElementById("foot").textContent =
    `Made by clmoe ${PAGE.about.version} (clmoe report --format html). This page loads nothing from elsewhere.`;
}

// The system's theme until the reader chooses one; the choice is kept where the browser lets a page keep something.
function theme() {
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;
  const current = () => root.dataset.theme ?? (system.matches ? "dark" : "light");
  const other = () => (current() === "dark" ? "light" : "dark");
  const show = () => {
    button.textContent = other() === "dark" ? "Dark" : "Light";
    button.setAttribute("aria-label", `switch to the ${other()} theme`);
  };
  try {
    const saved = localStorage.getItem("clmoe-theme");
    if (saved === "light" || saved === "dark") root.dataset.theme = saved;
  } catch {
    // nothing can be kept
  }
  show();
  system.addEventListener("change", show);
  button.addEventListener("click", () => {
    root.dataset.theme = other();
    show();
    try {
      localStorage.setItem("clmoe-theme", root.dataset.theme);
    } catch {
      // nothing can be kept
    }
  });
}

function sections() {
  for (const section of document.querySelectorAll("section[data-figure]")) {
    const name = section.dataset.figure;
    const { columns, rows } = PAGE.figures[name];
    if (!rows.length) {
      section.remove();
      continue;
    }
    section.querySelector("h2").append(csvButton(name, () => csv(columns, rows)));
    FIGURES[name](section.querySelector(".body"), section.querySelector(".controls"));
  }
  const samples = document.getElementById("samples");
  if (PAGE.samples.questions.length) Samples.start(samples);
  else samples.remove();
  const links = [...document.querySelectorAll("section")].map((section) =>
    el("a", { href: `#${section.id}` }, section.dataset.nav),
  );
  document.getElementById("nav").append(...links);
}

summary();
theme();
sections();
