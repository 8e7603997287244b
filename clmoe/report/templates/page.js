"use strict";
// Without this script the page shows everything; it filters the sample answers and saves figures as files.

function save(name, href) {
  const link = document.createElement("a");
  link.download = name.replace(/[^\w.-]+/g, "_");
  link.href = href;
  link.click();
}

// A figure as a file of its own: colours that are variables of the page become those of now.
function drawn(svg) {
  const style = getComputedStyle(svg);
  const probe = svg.parentNode.appendChild(document.createElement("i"));
  const colour = (text) => {
    probe.style.color = text;
    return getComputedStyle(probe).color;
  };
  const copy = svg.cloneNode(true);
  const { width, height } = svg.viewBox.baseVal;
  for (const [name, value] of Object.entries({ width, height })) {
    copy.setAttribute(name, value);
  }
  copy.setAttribute("style", `background: ${colour("var(--card)")}; font-family: ${style.fontFamily.replaceAll('"', "'")}`);
  const text = new XMLSerializer()
    .serializeToString(copy)
    .replace(/var\(--[\w-]+\)|currentColor/g, (found) => colour(found));
  probe.remove();
  return { href: `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`, width, height };
}

for (const holder of document.querySelectorAll(".export")) {
  const svg = holder.closest("figure").querySelector("svg");
  const [asSvg, asPng] = holder.querySelectorAll("button");
  for (const button of [asSvg, asPng]) button.setAttribute("aria-label", `${holder.dataset.name} as ${button.textContent}`);
  asSvg.addEventListener("click", () => save(`${holder.dataset.name}.svg`, drawn(svg).href));
  asPng.addEventListener("click", async () => {
    const { href, width, height } = drawn(svg);
    const image = new Image();
    image.src = href;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [4 * width, 4 * height];
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    save(`${holder.dataset.name}.png`, canvas.toDataURL("image/png"));
  });
  holder.hidden = false;
}

const STEP = 12; // questions shown at a time

function filterAnswers(form) {
  const cards = [...document.querySelectorAll("#samples article")];
  const more = document.getElementById("more");
  let limit = STEP;

  function apply() {
    const chosen = Object.fromEntries(new FormData(form));
    const fits = (row) =>
      ["method", "seed", "outcome"].every((name) => !chosen[name] || row.dataset[name] === chosen[name]);
    let questions = 0;
    let answers = 0;
    for (const card of cards) {
      const rows = [...card.querySelectorAll("tbody tr")];
      for (const row of rows) row.hidden = !(fits(row) && (!chosen.task || card.dataset.task === chosen.task));
      const found = rows.filter((row) => !row.hidden).length;
      answers += found;
      questions += found > 0;
      card.hidden = !found || questions > limit;
    }
    const left = Math.max(questions - limit, 0);
    document.getElementById("matches").textContent = `${answers} answers to ${questions} questions match.`;
    more.hidden = !left;
    more.textContent = `Show ${Math.min(STEP, left)} more of ${left}`;
  }

  form.addEventListener("input", () => {
    limit = STEP;
    apply();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    limit += STEP;
    apply();
  });
  form.hidden = false;
  apply();
}

const filters = document.querySelector(".filters");
if (filters) filterAnswers(filters);
