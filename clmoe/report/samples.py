"""Which questions and answers a page shows: the same questions for all runs, forgotten ones first."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clmoe.report.images import Thumbnails, image_folders
from clmoe.report.predictions import OUTCOMES, Pair, Prediction, read_pairs
from clmoe.report.run import Group, Run

PER_TASK = 24
FORGOTTEN_SHARE = 0.75  # of the questions of a task, as far as there are any
LONGEST = 1000  # characters of a question or answer
Pairs = dict[str, dict[str, Pair]]


def read_answers(groups: Sequence[Group]) -> list[tuple[Run, Pairs]]:
    """The answers of every run, in the order of the groups."""
    return [(run, read_pairs(run)) for group in groups for run in group.runs]


def count_outcomes(answers: Sequence[tuple[Run, Pairs]], label: str, task: str) -> dict[str, int]:
    """Questions of a task by outcome, summed over the seeds of a label; empty where no question was asked twice."""
    counts = Counter(pair.outcome for run, pairs in answers if run.label == label for pair in pairs[task].values())
    return {outcome: counts[outcome] for outcome in OUTCOMES} if any(counts[name] for name in OUTCOMES) else {}


def choose(answers: Sequence[tuple[Run, Pairs]], task: str, number: int = PER_TASK) -> list[str]:
    """Question ids of a task to show, in a fixed pseudo-random order that only their names decide.

    The labels take turns in choosing a question that they forgot, up to `FORGOTTEN_SHARE` of the number; the others
    are drawn from all questions, those asked twice before those asked once.
    """
    outcomes: dict[str, set[str]] = {}  # question -> outcomes met
    forgotten: dict[str, set[str]] = {run.label: set() for run, _ in answers}
    for run, pairs in answers:
        for name, pair in pairs[task].items():
            outcomes.setdefault(name, set()).add(pair.outcome)
            if pair.outcome == "forgotten":
                forgotten[run.label].add(name)
    ranked = sorted(outcomes, key=lambda name: (outcomes[name] == {"unknown"}, _rank(task, name)))
    chosen: list[str] = []
    queues = [[name for name in ranked if name in names] for names in forgotten.values()]
    while any(queues) and len(chosen) < FORGOTTEN_SHARE * number:
        for queue in queues:
            while queue and queue[0] in chosen:
                queue.pop(0)
            if queue and len(chosen) < FORGOTTEN_SHARE * number:
                chosen.append(queue.pop(0))
    rest = [name for name in ranked if name not in chosen]
    return sorted([*chosen, *rest[: number - len(chosen)]], key=ranked.index)


def sample_data(groups: Sequence[Group], answers: Sequence[tuple[Run, Pairs]], data: Path | None) -> dict[str, Any]:
    """What the page shows of the predictions, as plain JSON; without predictions it has no questions.

    Keys: `runs` [label, seed]; `questions` with the image's number or the reason for none; `answers`
    [question, run, then, now, located, outcome] with then and now [text, right] or None; `images`; `totals` by task:
    [shown, asked].
    """
    tasks = groups[0].runs[0].order
    images = Thumbnails(image_folders([run for run, _ in answers], data))
    questions: list[dict[str, Any]] = []
    rows: list[list[Any]] = []
    totals = {}
    for task in tasks:
        chosen = choose(answers, task)
        totals[task] = [len(chosen), len({name for _, pairs in answers for name in pairs[task]})]
        for name in chosen:
            asked = [(number, pairs[task][name]) for number, (_, pairs) in enumerate(answers) if name in pairs[task]]
            rows += [[len(questions), number, *_answer(pair)] for number, pair in asked]
            questions.append(_question(task, asked[0][1].asked, images))
    runs = [[run.label, run.seed] for run, _ in answers]
    return {"runs": runs, "questions": questions, "answers": rows, "images": images.uris, "totals": totals}


def _question(task: str, asked: Prediction, images: Thumbnails) -> dict[str, Any]:
    return {
        "task": task,
        "id": asked.question,
        "file": asked.image,
        "image": None if asked.image is None else images.add(task, asked.image),
        "prompt": _clip(asked.prompt),
        "reference": _clip(asked.reference),
    }


def _answer(pair: Pair) -> list[Any]:
    then, now = (None if shown is None else [_clip(shown.text), shown.right] for shown in (pair.then, pair.now))
    return [then, now, None if pair.now is None else pair.now.located, pair.outcome]


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def _rank(task: str, question: str) -> bytes:
    return hashlib.sha256(f"{task}:{question}".encode("utf-8", "replace")).digest()
