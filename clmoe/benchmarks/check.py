"""`clmoe data check`: every row and every image of a benchmark, and a list of what is bad."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from clmoe.benchmarks.gold import READERS
from clmoe.benchmarks.questions import complete
from clmoe.data.images import load_image
from clmoe.data.records import iterate_questions, iterate_train
from clmoe.errors import ClmoeError

if TYPE_CHECKING:
    from clmoe.benchmarks.base import Benchmark, Task
    from clmoe.data.records import Question

R = TypeVar("R")

_IN_THIS_PROCESS = 256
"""Fewer images than this are decoded without further processes."""

Matchable = Callable[[str, "Question"], str | None]
"""``(scorer, question)``: what is wrong with the gold answer, or None."""


@dataclass
class Checked:
    """What was found.

    Attributes:
        lines: one for each task: the counts.
        notes: what is no fault, but should be known.
        bad: one for each bad row, image or file.
    """

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


def check_benchmark(benchmark: Benchmark, matchable: Matchable) -> Checked:
    """Read everything: rows, images (decoded, each once), gold files; no row stops the check."""
    result = Checked()
    images: set[Path] = set()
    for name, kind, path in benchmark.missing_files():
        source = benchmark.source(path)
        result.bad.append(f"task {name}, {kind}: no file {path}" + (f" (from {source})" if source else ""))
    if result.bad and benchmark.prepare is not None:
        result.notes.append(f"`clmoe data prepare {benchmark.name}` builds what can be built")
    for task in benchmark.tasks:
        _check_task(task, result, images, matchable)
    result.bad += _broken(sorted(images))
    result.lines.append(f"{len(images)} different images decoded")
    return result


def _check_task(task: Task, result: Checked, images: set[Path], matchable: Matchable) -> None:
    bad = len(result.bad)

    def failed(error: ClmoeError) -> None:
        result.bad.append(str(error))

    trained = repeated = 0
    if task.train.is_file():
        for record in _until_broken(iterate_train(task.train, task.image_root, failed), failed):
            trained += 1
            repeated += "#" in record.id
            if record.image is not None:
                images.add(task.image_root / record.image)
    questions: list[Question] = []
    if task.test.is_file():
        bad_before = len(result.bad)
        rows = iterate_questions(task.test, task.image_root, failed, answered=task.gold is None)
        questions = list(_until_broken(rows, failed))
        images.update(task.image_root / question.image for question in questions if question.image is not None)
        _check_answers(task, questions, len(result.bad) > bad_before, result, matchable)
    if repeated:
        result.notes.append(f"{task.name}: {repeated} training ids hold a '#'; repeated ones are numbered #2, #3, ...")
    result.lines.append(f"{task.name:<16}{trained:>7} train {len(questions):>7} test {len(result.bad) - bad:>7} bad")


def _check_answers(task: Task, questions: list[Question], lost: bool, result: Checked, matchable: Matchable) -> None:
    """The expected answers; ``lost``: not all rows of the test file are among the questions."""

    def failed(error: ClmoeError) -> None:
        result.bad.append(str(error))

    if task.gold is not None:
        if not all(path.is_file() for path in task.gold.files):
            return
        if lost and READERS[task.gold.reader].whole:
            result.notes.append(f"{task.name}: expected answers are looked for once all rows of the test file are good")
            return
    try:
        completed = complete(task, questions, failed)
    except ClmoeError as error:  # of a gold file that cannot be read at all
        failed(error)
        return
    for question in completed:
        problem = matchable(task.scorer, question)
        if problem:
            result.bad.append(f"{task.test}: {problem}")
    if task.scorer == "vqa" and not all("answers" in question.extra for question in completed):
        result.notes.append(f"{task.name}: questions without ten annotators are scored by exact match")


def _until_broken(rows: Iterable[R], failed: Callable[[ClmoeError], None]) -> Iterator[R]:
    """The rows up to where the file itself cannot be read on, which is told like a bad row."""
    try:
        yield from rows
    except ClmoeError as error:
        failed(error)


def _broken(images: list[Path]) -> list[str]:
    """What is wrong with each image that cannot be decoded, by as many processes as there are cores for this one."""
    workers = len(os.sched_getaffinity(0))
    if len(images) < _IN_THIS_PROCESS or workers < 2:
        return [problem for problem in map(_problem, images) if problem]
    # spawned, so that nothing of this process (locks of its threads, say) goes with them
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [problem for problem in pool.map(_problem, images, chunksize=64) if problem]


def _problem(path: Path) -> str | None:
    try:
        load_image(path)
    except ClmoeError as error:
        return str(error)
    return None
