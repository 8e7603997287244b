"use strict";
// Filters the sample answers, which are all in the page; without this script it shows every one of them.
const STEP = 12; // questions shown at a time
const form = document.querySelector(".filters");
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
