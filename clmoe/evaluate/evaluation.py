"""Evaluate one checkpoint on tasks: predictions and scores into the run folder, each file complete or absent."""

from __future__ import annotations

import json
import os
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.benchmarks.base import Benchmark
from clmoe.benchmarks.questions import sampled, task_questions
from clmoe.config import Config
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.continual import AccuracyMatrix, metrics, write_immediate_csv
from clmoe.evaluate.partial import PartialAnswers
from clmoe.evaluate.rules.base import shown_answer
from clmoe.evaluate.scoring import check_scorer, score_answers
from clmoe.system.files import csv_text, read_json, write_json, write_text
from clmoe.system.logging import EventLog, Progress, Stage, read_events, timed
from clmoe.system.processes import from_main
from clmoe.system.provenance import provenance

if TYPE_CHECKING:
    from clmoe.evaluate.generate import Answer, Answerer
    from clmoe.model.routing import RouterChoice

ZERO_SHOT = "zero_shot"


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


def is_done(run: Path, checkpoint: Checkpoint, request: Request) -> bool:
    """The cell was filled from this very checkpoint with these settings."""
    path = summary_path(run, checkpoint.after, request.stem())
    if not path.is_file():
        return False
    return json.loads(path.read_text(encoding="utf-8"))["settings"] == _settings(checkpoint, request)


def _settings(checkpoint: Checkpoint, request: Request) -> dict[str, Any]:
    evaluation = checkpoint.config.evaluation
    return {
        "checkpoint": checkpoint.identity,
        "scoring": request.scoring,
        "limit": request.limit,
        "exact": evaluation.exact,
        # exact answers do not depend on the batches, others not on the margin
        "margin": evaluation.margin if evaluation.exact else None,
        "batch_size": None if evaluation.exact else evaluation.batch_size,
        **({} if evaluation.exact else {"share_images": evaluation.share_images}),
        "options": checkpoint.config.options,
    }


def evaluate(
    run: Path, benchmark: Benchmark, checkpoint: Checkpoint, requests: list[Request], answerer: Answerer,
    stage: Stage | None = None,
) -> None:  # fmt: skip
    """Fill the cells that are not filled yet. Called by every process; the main one writes."""
    log, begun = EventLog(run / "events.jsonl"), False
    for request in requests:
        if from_main(partial(settled, run, checkpoint, request)):
            continue
        task = benchmark.task(request.task)
        check_scorer(task.scorer)
        questions = sampled(task_questions(task), request.limit)
        if not begun:  # not before the first questions proved readable
            log.write("started", after=checkpoint.after, **provenance())
            begun = True
        title = f"{checkpoint.after} > {request.stem()}"
        index = checkpoint.learned.index(request.task) if request.task in checkpoint.learned else None
        # The report finds the images of the predictions by these two.
        places = {"data": str(benchmark.root), "images": os.path.relpath(task.image_root, benchmark.root)}
        with (
            timed(log, "evaluated", after=checkpoint.after, task=request.stem(), **places) as extra,
            Progress(title, len(questions), read_events(log.path), stage) as progress,
        ):
            answers = answerer.answer(
                questions,
                task.image_root,
                task.max_new_tokens,
                request.router,
                index,
                progress.advance_rows,
                _partial(run, checkpoint, request),
            )
            extra["score"] = from_main(partial(_write_cell, run, checkpoint, request, task.scorer, questions, answers))


def _partial(run: Path, checkpoint: Checkpoint, request: Request) -> PartialAnswers:
    """Where the cell's answers lie until it is complete."""
    evaluation = checkpoint.config.evaluation
    cut = [evaluation.batch_size, evaluation.share_images]  # others would cut other batches
    path = summary_path(run, checkpoint.after, request.stem())
    return PartialAnswers.of(path, [_settings(checkpoint, request), cut])


def settled(run: Path, checkpoint: Checkpoint, request: Request) -> bool:
    """As ``is_done``; removes what a crash left beside a complete cell."""
    done = is_done(run, checkpoint, request)
    if done:
        _partial(run, checkpoint, request).remove()
    return done


def _write_cell(
    run: Path,
    checkpoint: Checkpoint,
    request: Request,
    scorer: str,
    questions: list[Question],
    answers: list[Answer],
) -> float:
    """Write the predictions, then the summary that makes them count. Returns the score in percent."""
    path = summary_path(run, checkpoint.after, request.stem())
    scored = score_answers(scorer, [a.text for a in answers], questions, request.scoring)  # type: ignore[arg-type]
    rows = [
        {
            "question_id": q.question_id,
            "image": q.image,
            "prompt": q.text,
            "text": a.text,
            "answer": shown_answer(q),
            "score": s,
            "task": None if a.task is None else checkpoint.learned[a.task],
            "redone": a.redone,
        }
        for q, a, s in zip(questions, answers, scored.rows, strict=True)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    write_text(path.with_suffix(".jsonl"), lines)
    percent = 100 * scored.score
    located = [row["task"] == request.task for row in rows if row["task"] is not None]
    deciders = {
        name: Counter(checkpoint.learned[a.deciders[name]] for a in answers) for name in sorted(answers[0].deciders)
    }
    summary = {
        "score": percent,
        "parts": dict(scored.parts),
        "questions": len(rows),
        "redone": sum(a.redone for a in answers),
        "located": 100 * sum(located) / len(located) if located else None,
        "deciders": deciders,
        "settings": _settings(checkpoint, request),
    }
    write_json(path, summary)
    _partial(run, checkpoint, request).remove()
    return percent


def read_score(run: Path, after: str, stem: str) -> float | None:
    """A filled cell's score in percent, None where nothing was measured."""
    path = summary_path(run, after, stem)
    return float(read_json(path)["score"]) if path.is_file() else None


def write_tables(run: Path, order: list[str], router: RouterChoice = "located") -> dict[str, float | None]:
    """Rebuild the run's tables from its cells.

    ``matrix.csv``, ``immediate.csv`` (router known, where measured), ``locator.csv`` (where tasks were located) and
    ``metrics.json``.

    Args:
        order: all tasks of the run, in training order.
        router: the matrix shows the cells of the default router; a run folder that holds none shows this one's.

    Returns the metrics.
    """
    if any(summary_path(run, after, task).is_file() for after in (ZERO_SHOT, *order) for task in order):
        router = "located"
    matrix = AccuracyMatrix(tuple(order), {})
    for after in (ZERO_SHOT, *order):
        scores = {task: read_score(run, after, cell_stem(task, router)) for task in order}
        if any(value is not None for value in scores.values()):
            matrix = matrix.with_row(after, scores)
    if list(matrix.rows) == [ZERO_SHOT]:  # a method that trains nothing ends the sequence as it began
        matrix = matrix.with_row(order[-1], dict(zip(order, matrix.row(ZERO_SHOT), strict=True)))
    known = [read_score(run, task, f"{task}.oracle") for task in order]
    immediate = None
    if any(value is not None for value in known):
        write_immediate_csv(run / "immediate.csv", order, known)
        immediate = tuple(known)
    _write_located(run, order)
    matrix.write_csv(run / "matrix.csv")
    result = metrics(matrix, immediate)
    write_json(run / "metrics.json", result)
    return result


def _write_located(run: Path, order: list[str]) -> None:
    """``locator.csv``: for which task each decider took the questions of each task, after each task."""
    rows = []
    for after in order:
        for task in order:
            path = summary_path(run, after, task)
            counts = read_json(path)["deciders"] if path.is_file() else {}
            for decider, located in sorted(counts.items()):
                rows += [(after, decider, task, name, located[name]) for name in order if name in located]
    if not rows:
        return
    write_text(run / "locator.csv", csv_text([("after", "decider", "task", "located", "count"), *rows]))


def check_tasks(benchmark: Benchmark, names: list[str]) -> None:
    """Every name is a task of the benchmark, and its scorer is known and can run here.

    Raises:
        ClmoeError: naming the nearest known task or scorer, or what the scorer needs.
    """
    if not names:
        raise ClmoeError("no task to evaluate: name them with --tasks a,b")
    for name in names:
        check_scorer(benchmark.task(name).scorer)
