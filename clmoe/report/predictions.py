"""The answers of a run to the test questions of each task: right after training it, and at the end of the sequence."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from clmoe.errors import ClmoeError
from clmoe.report.reading import check_field, is_number, read_json, read_lines
from clmoe.report.run import Run

# A score of at least this counts as right. Most rules give 0 or 1; VQA's consensus gives parts of it (0.3 where one
# annotator in ten agrees, 0.6 where two do), science the found share of several answers.
RIGHT = 0.5
Outcome = Literal["kept", "forgotten", "gained", "never", "unknown"]
OUTCOMES: tuple[Outcome, ...] = ("kept", "forgotten", "gained", "never")
_ROUTERS = ("oracle", "last", "random")


@dataclass(frozen=True, slots=True)
class Prediction:
    """One line of a prediction file.

    Attributes:
        score: in [0, 1]; None under a rule that judges all answers of a task at once (captions).
        located: the task whose routers answered, None where none was chosen.
    """

    question: str
    image: str | None
    prompt: str
    reference: str
    text: str
    score: float | None
    located: str | None

    @property
    def right(self) -> bool | None:
        return None if self.score is None else self.score >= RIGHT


@dataclass(frozen=True, slots=True)
class Pair:
    """One question's answer right after its task was trained and at the end; None where it was not asked."""

    then: Prediction | None
    now: Prediction | None

    @property
    def asked(self) -> Prediction:
        """Either answer, for what both share: the question."""
        found = self.now or self.then
        assert found is not None
        return found

    @property
    def outcome(self) -> Outcome:
        """Forgotten is what was right then and is wrong at the end; unknown what was not judged both times."""
        if self.then is None or self.now is None or self.then.right is None or self.now.right is None:
            return "unknown"
        if self.then.right:
            return "kept" if self.now.right else "forgotten"
        return "gained" if self.now.right else "never"


def read_pairs(run: Run) -> dict[str, dict[str, Pair]]:
    """All questions of a run that were answered then or at the end: task -> question id -> pair."""
    router = _router(run)
    pairs: dict[str, dict[str, Pair]] = {}
    for task in run.order:
        then = _read(run.path, task, task + router)
        now = _read(run.path, run.order[-1], task + router)
        pairs[task] = {name: Pair(then.get(name), now.get(name)) for name in {**now, **then}}
    return pairs


def _router(run: Run) -> str:
    """The ending of the cells that the matrix shows: of the default router, else of the one that was evaluated."""
    folder = run.path / "predictions"
    for ending in ("", *(f".{router}" for router in _ROUTERS)):
        if any((folder / after / f"{task}{ending}.jsonl").is_file() for after in run.order for task in run.order):
            return ending
    return ""


def _read(run: Path, after: str, stem: str) -> dict[str, Prediction]:
    """The predictions of one cell by question id; empty where there is none, or its summary was never written."""
    path = run / "predictions" / after / f"{stem}.jsonl"
    summary = path.with_suffix(".json")
    if not path.is_file() or not summary.is_file():
        return {}
    rows = [_row(f"{path}, row {number}", line) for number, line in read_lines(path)]
    if read_json(summary, dict).get("parts"):  # scored as a whole: a row's figure is neither right nor wrong
        rows = [replace(row, score=None) for row in rows]
    return {row.question: row for row in rows}


def _row(where: str, line: str) -> Prediction:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ClmoeError(f"{where}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise ClmoeError(f"{where}: expected an object, found {type(row).__name__}")
    for field in ("question_id", "prompt", "text", "answer"):
        check_field(where, row, field, (str,))
    for field in ("image", "task"):
        check_field(where, row, field, (str, type(None)))
    if not is_number(row.get("score")):
        raise ClmoeError(f"{where}: field 'score' is {row.get('score')!r}; expected a number")
    return Prediction(
        row["question_id"], row["image"], row["prompt"], row["answer"], row["text"], row["score"], row["task"]
    )
