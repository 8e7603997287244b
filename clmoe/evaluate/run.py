"""Evaluate a model on tasks: predictions, scores and tables of a run folder, each file complete or absent.

After training task ``after``, ``predictions/<after>/<task>.jsonl`` holds the answers, and ``<task>.json`` their score
and what it depends on: a cell of the accuracy matrix. It is answered or scored again only if that has changed.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from peft import PeftModel

from clmoe.bases.llava import LoadedBase, base_fingerprint
from clmoe.benchmarks.base import Benchmark, Task, sampled, task_questions
from clmoe.config import Config
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Answer, Answerer, open_answerer
from clmoe.evaluate.matrix import (
    ZERO_SHOT,
    AccuracyMatrix,
    Scores,
    general_metrics,
    metrics,
    write_table,
)
from clmoe.evaluate.record import record_checkpoint
from clmoe.evaluate.rules import Mode
from clmoe.evaluate.scoring import check_gold, check_scorer, score_answers, shown_answer
from clmoe.experts.forward import feature_folder
from clmoe.experts.model import detach_adapter
from clmoe.locators.base import Locator
from clmoe.methods import method_class
from clmoe.methods.base import Method
from clmoe.train.checkpoint import Finished
from clmoe.utils import files
from clmoe.utils.files import csv_text, json_sha256, read_json, write_json, write_text
from clmoe.utils.logging import EventLog, Progress, Stage, provenance, read_events, timed, write_timing
from clmoe.utils.paths import resolve_model_path
from clmoe.utils.processes import count, from_main, rank


def evaluate_checkpoint(
    run: Path,
    benchmark: Benchmark,
    done: Finished | None,
    config: Config,
    order: list[str],
    *,
    tasks: list[str] | None = None,
    scoring: Mode = "fixed",
    base: LoadedBase | None = None,
) -> tuple[str, LoadedBase | None]:
    """Fill a checkpoint's row of the accuracy matrix and write the run's files; loads no model if the row is filled.

    Rows before the last task's ask ``evaluation.limit`` questions of each task. Every process calls this. Returns the
    scores as one line, ``after text: sqa 40.0, text 91.3``, and the base without adapter, if it is loaded by now.

    Args:
        done: None for the bare base, which fills row ``zero_shot``.
        config: the checkpoint's; locator, evaluation settings and options may differ from those at training.
        tasks: of ``order``; by default all learned ones (for the base: all), for methods with parts the newest again
            with the oracle, and with ``evaluation.general`` what ``asked_besides`` names.

    Raises ClmoeError before the first answer for another base or order, or a question that cannot be read or scored.
    """
    learned = [] if done is None else done.lineage.tasks
    names = benchmark.named(tasks or learned or order, "--tasks")
    check_tasks(benchmark, names)
    from_main(lambda: check_run_order(run, order))
    method = method_class(config.method)
    other = config.locator.name if done is not None and config.locator.name != done.locator.name else ""
    wanted = [(task, other) for task in map(benchmark.task, names)]
    if method.keeps_parts and learned and not tasks and not other and config.locator.name != "oracle":
        wanted.append((benchmark.task(learned[-1]), "oracle"))
    wanted += [] if tasks else [(task, other) for task in asked_besides(benchmark, config, order, learned)]
    identity = base_fingerprint(resolve_model_path(config.model.path)) if done is None else done.identity
    limit = config.evaluation.limit if learned and learned[-1] != order[-1] else None
    cells = [Cell(run, task, by, scoring, limit, config, identity, learned) for task, by in wanted]
    missing = from_main(lambda: [cell for cell in cells if not cell.settled()])
    if missing:
        answerer = open_answerer(config, done, base, feature_folder(run), benchmark)
        fill_cells(missing, benchmark, order, answerer)
        base = answerer.base
        if isinstance(answerer.model, PeftModel):
            detach_adapter(answerer.model)

    def record() -> str:
        always_known = method.keeps_parts and config.locator.name == "oracle"
        sets, untrained = benchmark.asked([], general=True), method.chain == "none"
        write_tables(run, order, other, sets, scoring=scoring, untrained=untrained, always_known=always_known)
        write_timing(run)
        write_run_info(run, benchmark, config, order, scoring, done)
        if done is not None:
            record_checkpoint(run, done, order)
        scores = ", ".join(f"{cell.path.stem} {read_json(cell.path)['score']:.1f}" for cell in cells)
        return f"after {cells[0].after}: {scores}"

    return from_main(record), base


def asked_besides(benchmark: Benchmark, config: Config, order: list[str], learned: list[str]) -> list[Task]:
    """With ``evaluation.general``: the task after the learned ones, for forward transfer, and sets of general ability.

    The locator chooses a part for such a question as for any other. The oracle has no answer for it, so for a method
    with parts under the oracle, only the bare base is asked.
    """
    parts = bool(learned) and method_class(config.method).keeps_parts
    if not config.evaluation.general or (parts and config.locator.name == "oracle"):
        return []
    following = [task for before, task in pairwise(order) if learned and before == learned[-1]]
    return [*map(benchmark.task, following), *benchmark.general]


def check_tasks(benchmark: Benchmark, names: Sequence[str]) -> None:
    """Raise ClmoeError unless the scorer of each of these ``sets`` of the benchmark is known and can run here."""
    for task in benchmark.sets(names):
        try:
            check_scorer(task.scorer)
        except ClmoeError as error:
            raise ClmoeError(f"benchmark {benchmark.name}: task {task.name!r}, field 'scorer': {error}") from error


def check_questions(benchmark: Benchmark, names: Sequence[str], *, images: bool = False) -> list[Question]:
    """The sets' questions. Raises ClmoeError, naming file and row or question, unless all can be read and scored.

    Their images need to exist only with ``images``.
    """
    found = []
    for task in benchmark.sets(names):
        questions = task_questions(task, images=images)
        _check_gold(task, questions, "fixed")
        found += questions
    return found


def _check_gold(task: Task, questions: list[Question], mode: Mode) -> None:
    try:
        check_gold(task.scorer, questions, mode)
    except ClmoeError as error:
        raise ClmoeError(f"{task.test}: {error}") from error


def check_run_order(run: Path, order: list[str]) -> None:
    """Raise ClmoeError if the run folder holds another order. One may continue the other: a sequence can grow."""
    recorded = read_json(run / "run.json")["order"] if (run / "run.json").is_file() else []
    if any(ours != theirs for ours, theirs in zip(order, recorded, strict=False)):
        held = f"{run} holds a run in the order {', '.join(recorded)}, but --order here is {', '.join(order)}"
        raise ClmoeError(f"{held}: give the same --order or choose another --output")


def summary_path(run: Path, after: str, task: str, locator: str = "") -> Path:
    """The file of a cell's score and settings; ``locator`` may be a Python file; empty is the checkpoint's own."""
    return run / "predictions" / after / (f"{task}.{Path(locator).stem}.json" if locator else f"{task}.json")


@dataclass(frozen=True)
class Cell:
    """One score of a run: a model asked a task's questions.

    Attributes:
        locator: one other than the checkpoint's own (the configured one, or ``oracle``); empty for the own.
        identity: sha256 of the checkpoint's manifest, or the bare base's fingerprint.
        learned: the model's tasks, oldest first; none for the bare base.
    """

    run: Path
    task: Task
    locator: str
    scoring: Mode
    limit: int | None
    config: Config
    identity: str
    learned: list[str]

    @property
    def after(self) -> str:
        """The row in the matrix."""
        return self.learned[-1] if self.learned else ZERO_SHOT

    @property
    def path(self) -> Path:
        """The file of the score and its settings; the answers are beside it as ``.jsonl``."""
        return summary_path(self.run, self.after, self.task.name, self.locator)

    def questions(self, *, images: bool) -> list[Question]:
        return sampled(task_questions(self.task, images=images), self.task.sample(self.limit))

    def answer_settings(self, questions: list[Question]) -> dict[str, Any]:
        """All that the answers depend on."""
        model, evaluation, locator = self.config.model, self.config.evaluation, self.config.locator
        # exact answers depend on the margin but not on how batches are cut; for others it is the other way round
        cut = {"batch_size": evaluation.batch_size, "share_images": evaluation.share_images}
        return {
            "checkpoint": self.identity,
            "questions": json_sha256([[question.question_id, question.image, question.text] for question in questions]),
            "max_new_tokens": self.task.max_new_tokens,
            "dtype": model.dtype,
            "load_in_4bit": model.load_in_4bit,
            **({"load_in_8bit": True} if model.load_in_8bit else {}),
            "exact": evaluation.exact,
            "margin": evaluation.margin if evaluation.exact else None,
            **({"batch_size": None} if evaluation.exact else cut),
            "options": self.config.options,
            "locator": asdict(locator) if self.locator in ("", locator.name) else self.locator,
        }

    def score_settings(self, questions: list[Question]) -> dict[str, Any]:
        """All that the scores of given answers depend on."""
        gold = json_sha256([[question.answer, question.extra] for question in questions])
        return {"scoring": self.scoring, "scorer": self.task.scorer, "gold": gold}

    def settled(self) -> bool:
        """Whether it is filled with these settings; scores again if only scoring or gold differ. Needs no image."""
        if not self.path.is_file():
            return False
        summary, questions = read_json(self.path), self.questions(images=False)
        settings = summary.pop("settings").items()
        if not self.answer_settings(questions).items() <= settings:
            return False
        if not self.score_settings(questions).items() <= settings:
            answers = self.path.with_suffix(".jsonl")
            rows = files.read_json_lines(answers) if answers.is_file() else []
            if [row.get("question_id") for row in rows] != [question.question_id for question in questions]:
                return False  # lost, cut or changed
            _check_gold(self.task, questions, self.scoring)
            self._write(questions, rows, summary)
        self._remove_hidden_files()
        return True

    def fill(self, questions: list[Question], answerer: Answerer, advance: Callable[[int], None]) -> float:
        """Answer and score; returns percent. Continues from the hidden files to which processes append batches."""
        evaluation, task = self.config.evaluation, self.task
        key = json_sha256([self.answer_settings(questions), [evaluation.batch_size, evaluation.share_images]])[:16]
        mine = self.path.with_name(f".{self.path.stem}.partial-{key}-{rank()}.jsonl")

        def keep(batch: list[tuple[str, Answer]]) -> None:
            files.append_json_lines(mine, [{"question_id": name, **asdict(answer)} for name, answer in batch])
            advance(len(batch) * count())

        known, same = from_main(lambda: (self._kept(key), self._same(questions)))
        index = self.learned.index(task.name) if task.name in self.learned else None
        where = task.image_root, task.max_new_tokens, self.locator, index
        answers = answerer.answer(questions, *where, known, keep, same)
        finder = answerer.locator(self.locator)
        return from_main(lambda: self._complete(questions, answers, finder))

    def _complete(self, questions: list[Question], answers: list[Answer], finder: Locator | None) -> float:
        """Write the answers and their score, and what ``finder`` decided if it looked or asked."""
        rows = [
            {
                "question_id": question.question_id,
                "image": question.image,
                "prompt": question.text,
                "text": answer.text,
                "task": None if answer.task is None else self.learned[answer.task],
                "redone": answer.redone,
            }
            for question, answer in zip(questions, answers, strict=True)
        ]
        located, task = Counter(row["task"] for row in rows if row["task"] is not None), self.task.name
        summary = {
            "questions": len(rows),
            "redone": sum(answer.redone for answer in answers),
            "located": 100 * located[task] / len(rows) if located and task in self.learned else None,
            "locators": {finder.config.name: located} if finder is not None and (finder.looks or finder.asks) else {},
        }
        self.path.unlink(missing_ok=True)  # an older summary must never stand beside these answers
        percent = self._write(questions, rows, summary)
        self._remove_hidden_files()
        return percent

    def _write(self, questions: list[Question], rows: list[dict[str, Any]], summary: dict[str, Any]) -> float:
        """Score the answers; write them, then the summary that makes them count."""
        scored = score_answers(self.task.scorer, [row["text"] for row in rows], questions, self.scoring)
        text = ""
        for row, question, score in zip(rows, questions, scored.rows, strict=True):
            row |= {"answer": shown_answer(question), "score": score}
            text += json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n"
        write_text(self.path.with_suffix(".jsonl"), text)
        settings = self.answer_settings(questions) | self.score_settings(questions)
        percent = 100 * scored.score
        write_json(self.path, {**summary, "score": percent, "parts": dict(scored.parts), "settings": settings})
        return percent

    def _kept(self, key: str) -> dict[str, Answer]:
        """Answers by question id in all processes' hidden files; a line that was cut off is left out."""
        rows = [row for path in self._hidden_files(key) for row in files.read_json_lines(path)]
        return {row.pop("question_id"): Answer(**row) for row in rows}

    def _same(self, questions: list[Question]) -> dict[tuple[str, int | None], Answer]:
        """The answers of this model's other cells of the task, by question id and task: no locator changes these.

        There are none if an answer depends on its batch, or on more of the locator than the task that it finds.
        """
        method = method_class(self.config.method)
        if not (self.config.evaluation.exact and method.keeps_parts) or method.mixture is not Method.mixture:
            return {}
        wanted, found = self.answer_settings(questions), dict[tuple[str, int | None], Answer]()
        del wanted["locator"]
        for path in sorted(self.path.parent.glob(f"{self.task.name}*.json")):
            answers = path.with_suffix(".jsonl")
            if wanted.items() <= read_json(path)["settings"].items() and answers.is_file():
                for row in files.read_json_lines(answers):
                    task = self.learned.index(row["task"]) if row["task"] in self.learned else None
                    found[row["question_id"], task] = Answer(row["text"], math.inf, row["redone"], task)
        return found

    def _hidden_files(self, key: str = "*") -> list[Path]:
        return sorted(self.path.parent.glob(f".{self.path.stem}.partial-{key}-*.jsonl"))

    def _remove_hidden_files(self) -> None:
        for path in self._hidden_files():
            path.unlink()


def fill_cells(cells: list[Cell], benchmark: Benchmark, order: list[str], answerer: Answerer) -> None:
    """Fill these cells of one model. Every process calls this, with arguments as for ``evaluate_checkpoint``."""
    questions = [cell.questions(images=True) for cell in cells]
    for cell, asked in zip(cells, questions, strict=True):
        _check_gold(cell.task, asked, cell.scoring)
    after = cells[0].after
    stage = Stage(order.index(after), len(order)) if after in order else None
    log = EventLog(cells[0].run / "events.jsonl")
    log.write("started", after=after, **provenance())
    for cell, asked in zip(cells, questions, strict=True):
        name = cell.path.stem
        bar = Progress(f"{after} > {name}", len(asked), read_events(log.path), stage)
        # the report finds the images of the predictions by these two
        places = {"data": str(benchmark.root), "images": os.path.relpath(cell.task.image_root, benchmark.root)}
        with timed(log, "evaluated", after=after, task=name, **places) as extra, bar as display:
            extra["score"] = cell.fill(asked, answerer, display.advance_rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class RunInfo:
    """``run.json``, for reports; older runs lack the last three."""

    method: str
    label: str
    benchmark: str
    order: list[str]
    seed: int
    trainable_parameters: int
    adapter_parameters: int
    projector_trained: bool
    effective_scale: float | None
    steps_per_task: int
    locator: str = ""
    scoring: Mode = "fixed"
    limit: int | None = None  # questions per task in the rows before the last; None is all


def write_run_info(
    run: Path, benchmark: Benchmark, config: Config, order: list[str], scoring: Mode, done: Finished | None
) -> None:
    """Write ``run.json``; the bare base (``done`` is None) leaves that of a trained run alone.

    In a run with the checkpoint's own locator, another one has cells of its own: the run keeps its locator and limit.
    """
    path = run / "run.json"
    there = read_json(path) if path.is_file() else {}
    if done is None and there and method_class(there["method"]).chain != "none":
        return
    locator, limit = config.locator.name, None if done is None else config.evaluation.limit
    if done is not None and there.get("locator") == done.locator.name != locator:
        locator, limit = there["locator"], there.get("limit")
    lineage = None if done is None else done.lineage
    trained_at_once = len(order) if method_class(config.method).chain == "union" else 1
    info = RunInfo(
        method=config.method,
        label=config.name,
        benchmark=benchmark.name,
        order=order,
        seed=config.seed,
        locator=locator,
        scoring=scoring,
        limit=limit,
        trainable_parameters=lineage.trainable_parameters if lineage else 0,
        adapter_parameters=lineage.adapter_parameters if lineage else 0,
        projector_trained=lineage is not None and config.adapter.train_projector,
        effective_scale=lineage.effective_scale if lineage else None,
        steps_per_task=lineage.steps // trained_at_once if lineage else 0,
    )
    write_json(path, vars(info))


def write_tables(
    run: Path,
    order: list[str],
    locator: str = "",
    sets: Sequence[str] = (),
    *,
    scoring: Mode = "fixed",
    untrained: bool = False,
    always_known: bool = False,
) -> None:
    """Write ``matrix.csv``, ``immediate.csv``, ``locator.csv`` and ``metrics.json`` from the run's cells.

    The matrix shows cells of ``locator`` if there are none of the checkpoints' own. ``sets`` of general ability that
    were asked go to ``general.csv``. ``untrained``: the sequence ends as it began. ``always_known``: the matrix itself
    is measured with the task known.
    """
    stages = (ZERO_SHOT, *order)
    if any(summary_path(run, after, task).is_file() for after in order for task in order):
        locator = ""

    def summary(after: str, task: str, by: str) -> dict[str, Any]:
        path = summary_path(run, after, task, by)
        return read_json(path) if path.is_file() else {"settings": {"scoring": scoring}}

    def score(after: str, task: str, by: str) -> float | None:
        found = summary(after, task, by)
        return found.get("score") if found["settings"]["scoring"] == scoring else None

    def scores_of(names: Sequence[str]) -> dict[str, Scores]:
        rows = {after: tuple(score(after, n, locator if after in order else "") for n in names) for after in stages}
        rows = {after: scores for after, scores in rows.items() if {*scores} != {None}}
        return rows | {order[-1]: rows[ZERO_SHOT]} if untrained and list(rows) == [ZERO_SHOT] else rows

    rows, general = scores_of(order), scores_of(sets) if sets else {}
    known = [score(task, task, locator if always_known else "oracle") for task in order]
    if set(known) != {None}:
        write_table(run / "immediate.csv", order, [("immediate", known)])
    else:
        (run / "immediate.csv").unlink(missing_ok=True)  # from another scoring mode
    located = [
        (after, finder, task, name, counts[name])
        for number, after in enumerate(order)
        for task in order[: number + 1]
        for finder, counts in summary(after, task, locator).get("locators", {}).items()
        for name in order
        if name in counts
    ]
    if located:
        write_text(run / "locator.csv", csv_text([("after", "locator", "task", "located", "count"), *located]))
    matrix = AccuracyMatrix(tuple(order), rows)
    matrix.write_csv(run / "matrix.csv")
    found = metrics(matrix, known)
    if general:
        write_table(run / "general.csv", sets, general.items())
        found |= general_metrics(general, order[-1])
    write_json(run / "metrics.json", found)
