"""Evaluate one checkpoint on tasks: predictions and scores into the run folder, each file complete or absent."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.benchmarks.base import Benchmark, Task
from clmoe.benchmarks.questions import sampled, task_questions
from clmoe.config import Config
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.partial import PartialAnswers
from clmoe.evaluate.rules.base import Mode, shown_answer
from clmoe.evaluate.scoring import check_gold, check_scorer, score_answers
from clmoe.utils.files import json_sha256, read_json, read_json_lines, write_json, write_text
from clmoe.utils.logging import EventLog, Progress, Stage, provenance, read_events, timed
from clmoe.utils.processes import from_main

if TYPE_CHECKING:
    from clmoe.evaluate.generate import Answer, Answerer
    from clmoe.model.routing import RouterChoice


@dataclass(frozen=True)
class Checkpoint:
    """What evaluation needs to know of a checkpoint without loading it.

    Attributes:
        folder: None for the bare base.
        identity: sha256 of its manifest, or the base's fingerprint.
        after: row label: the newest task, or ``zero_shot``.
        learned: the tasks trained so far, oldest first.
        base: fingerprint of the base it belongs to.
    """

    folder: Path | None
    identity: str
    after: str
    learned: list[str]
    config: Config
    base: str


@dataclass(frozen=True)
class Request:
    """One cell to fill: a task under a router choice, in a scoring mode, on ``limit`` of its questions."""

    task: str
    router: RouterChoice
    scoring: str
    limit: int | None

    def stem(self) -> str:
        """File name without ending."""
        return cell_stem(self.task, self.router)


def cell_stem(task: str, router: RouterChoice) -> str:
    """File name of a cell without ending; the default router has no suffix."""
    return task if router == "located" else f"{task}.{router}"


def summary_path(run: Path, after: str, stem: str) -> Path:
    return run / "predictions" / after / f"{stem}.json"


@dataclass(frozen=True)
class _Cell:
    """A cell as it is asked for.

    Attributes:
        path: its summary; the answers lie beside it.
        answering, scoring: all that decides the answers, and their scores. Both are kept in the summary.
        partial: where the answers lie until it is complete.
    """

    path: Path
    task: Task
    questions: list[Question]
    answering: dict[str, Any]
    scoring: dict[str, Any]
    partial: PartialAnswers

    @property
    def answers_path(self) -> Path:
        return self.path.with_suffix(".jsonl")


def _open_cell(
    run: Path, benchmark: Benchmark, checkpoint: Checkpoint, request: Request, *, images: bool = True
) -> _Cell:
    """Read the questions; ``images`` as for ``task_questions``."""
    task = benchmark.task(request.task)
    questions = sampled(task_questions(task, images=images), request.limit)
    path = summary_path(run, checkpoint.after, request.stem())
    answering = _answer_settings(checkpoint, task, questions)
    evaluation = checkpoint.config.evaluation
    cut = [evaluation.batch_size, evaluation.share_images]  # others would cut other batches
    scoring = {
        "scoring": request.scoring,
        "scorer": task.scorer,
        "gold": json_sha256([[question.answer, question.extra] for question in questions]),
    }
    partial = PartialAnswers.of(path, [answering, cut])
    return _Cell(path, task, questions, answering, scoring, partial)


def _answer_settings(checkpoint: Checkpoint, task: Task, questions: list[Question]) -> dict[str, Any]:
    model, evaluation = checkpoint.config.model, checkpoint.config.evaluation
    return {
        "checkpoint": checkpoint.identity,
        "questions": json_sha256([[question.question_id, question.image, question.text] for question in questions]),
        "max_new_tokens": task.max_new_tokens,
        "dtype": model.dtype,
        "load_in_4bit": model.load_in_4bit,
        "exact": evaluation.exact,
        # exact answers do not depend on the batches, others not on the margin
        "margin": evaluation.margin if evaluation.exact else None,
        "batch_size": None if evaluation.exact else evaluation.batch_size,
        **({} if evaluation.exact else {"share_images": evaluation.share_images}),
        "options": checkpoint.config.options,
    }


def unanswered(run: Path, benchmark: Benchmark, checkpoint: Checkpoint, requests: list[Request]) -> list[Request]:
    """The cells that only a model can fill, in order; images are not looked at.

    A cell whose answers are there, but were scored otherwise or by other gold answers, is scored again from them. What
    a crash left beside a complete cell is removed.
    """
    return [request for request in requests if not _settled(run, benchmark, checkpoint, request)]


def _settled(run: Path, benchmark: Benchmark, checkpoint: Checkpoint, request: Request) -> bool:
    """The cell is filled, from this very checkpoint and with these settings."""
    path = summary_path(run, checkpoint.after, request.stem())
    if not path.is_file():
        return False
    summary = read_json(path)
    settings = summary.pop("settings").items()
    cell = _open_cell(run, benchmark, checkpoint, request, images=False)
    if not cell.answering.items() <= settings:
        return False
    if not cell.scoring.items() <= settings:
        rows = _kept_rows(cell)
        if rows is None:
            return False
        _write_scored(cell, rows, summary)
    cell.partial.remove()
    return True


def _kept_rows(cell: _Cell) -> list[dict[str, Any]] | None:
    """A complete cell's answers; None where the file is gone or was changed, so that they must be made again."""
    if not cell.answers_path.is_file():
        return None
    rows = read_json_lines(cell.answers_path)
    aligned = [row.get("question_id") for row in rows] == [question.question_id for question in cell.questions]
    return rows if aligned else None


def evaluate(
    run: Path, benchmark: Benchmark, checkpoint: Checkpoint, requests: list[Request], answerer: Answerer,
    stage: Stage | None = None,
) -> None:  # fmt: skip
    """Fill these cells. Called by every process; the main one writes.

    Raises:
        ClmoeError: a question cannot be read or scored; it is found before the first one is answered.
    """
    cells = [_open_cell(run, benchmark, checkpoint, request) for request in requests]
    for cell in cells:
        _check_gold(cell.task, cell.questions, cell.scoring["scoring"])
    log = EventLog(run / "events.jsonl")
    log.write("started", after=checkpoint.after, **provenance())  # not before all questions proved usable
    for request, cell in zip(requests, cells, strict=True):
        task = cell.task
        title = f"{checkpoint.after} > {request.stem()}"
        index = checkpoint.learned.index(request.task) if request.task in checkpoint.learned else None
        # The report finds the images of the predictions by these two.
        places = {"data": str(benchmark.root), "images": os.path.relpath(task.image_root, benchmark.root)}
        with (
            timed(log, "evaluated", after=checkpoint.after, task=request.stem(), **places) as extra,
            Progress(title, len(cell.questions), read_events(log.path), stage) as progress,
        ):
            answers = answerer.answer(
                cell.questions,
                task.image_root,
                task.max_new_tokens,
                request.router,
                index,
                progress.advance_rows,
                cell.partial,
            )
            extra["score"] = from_main(partial(_write_cell, cell, checkpoint.learned, answers))


def _write_cell(cell: _Cell, learned: list[str], answers: list[Answer]) -> float:
    """Write the answers and what was seen on the way. Returns the score in percent."""
    if len(answers) != len(cell.questions):
        raise ClmoeError(f"{len(answers)} answers for {len(cell.questions)} questions: an answer was lost")
    rows = [
        {
            "question_id": q.question_id,
            "image": q.image,
            "prompt": q.text,
            "text": a.text,
            "task": None if a.task is None else learned[a.task],
            "redone": a.redone,
        }
        for q, a in zip(cell.questions, answers, strict=True)
    ]
    located = [row["task"] == cell.task.name for row in rows if row["task"] is not None]
    summary = {
        "questions": len(rows),
        "redone": sum(a.redone for a in answers),
        "located": 100 * sum(located) / len(located) if located else None,
        "deciders": {name: Counter(learned[a.deciders[name]] for a in answers) for name in sorted(answers[0].deciders)},
    }
    cell.path.unlink(missing_ok=True)  # an older summary must never stand beside these answers
    percent = _write_scored(cell, rows, summary)
    cell.partial.remove()
    return percent


def _write_scored(cell: _Cell, rows: list[dict[str, Any]], summary: dict[str, Any]) -> float:
    """Score the answers; write them, then the summary that makes them count. Returns the score in percent."""
    scored = score_answers(cell.task.scorer, [row["text"] for row in rows], cell.questions, cell.scoring["scoring"])
    rows = [
        {**row, "answer": shown_answer(question), "score": score}
        for row, question, score in zip(rows, cell.questions, scored.rows, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    write_text(cell.answers_path, lines)
    percent = 100 * scored.score
    settings = {**cell.answering, **cell.scoring}
    write_json(cell.path, {**summary, "score": percent, "parts": dict(scored.parts), "settings": settings})
    return percent


def read_score(run: Path, after: str, stem: str, scoring: str) -> float | None:
    """A filled cell's score in percent, None where nothing was measured, or in another scoring mode."""
    path = summary_path(run, after, stem)
    summary = read_json(path) if path.is_file() else None
    if summary is None or summary["settings"]["scoring"] != scoring:
        return None
    return float(summary["score"])


def check_tasks(benchmark: Benchmark, names: list[str]) -> None:
    """Every name is a task of the benchmark, and its scorer is known and can run here.

    Raises:
        ClmoeError: naming the nearest known task or scorer, or what the scorer needs.
    """
    if not names:
        raise ClmoeError("no task to evaluate: name them with --tasks a,b")
    for name in names:
        check_scorer(benchmark.task(name).scorer)


def check_questions(benchmark: Benchmark, names: list[str], mode: Mode = "fixed") -> None:
    """The tasks' test and gold files can be read and every question can be scored; images are not looked at.

    Raises:
        ClmoeError: naming file and row or question.
    """
    for name in names:
        task = benchmark.task(name)
        _check_gold(task, task_questions(task, images=False), mode)


def _check_gold(task: Task, questions: list[Question], mode: Mode) -> None:
    try:
        check_gold(task.scorer, questions, mode)
    except ClmoeError as error:
        raise ClmoeError(f"{task.test}: {error}") from error
