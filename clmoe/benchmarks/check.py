"""`clmoe data check`: read every row and every image of a benchmark, and list what is bad."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from clmoe.benchmarks.base import Benchmark, Task, complete
from clmoe.benchmarks.gold import READERS
from clmoe.data.images import load_image
from clmoe.data.records import Question, iterate_questions, iterate_train
from clmoe.errors import ClmoeError

R = TypeVar("R")

GoldProblem = Callable[[str, Question], str | None]
"""``(scorer, question)``: what is wrong with the expected answer, or None."""


@dataclass
class Checked:
    """What was found: the counts of each task, what is no fault but worth knowing, and each bad row, image or file."""

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def failed(self, error: ClmoeError) -> None:
        """List an error as bad."""
        self.bad.append(str(error))


def check_benchmark(benchmark: Benchmark, gold_problem: GoldProblem) -> Checked:
    """Read all rows, gold files and images (each image once); nothing bad stops the check."""
    result = Checked(bad=benchmark.missing_files())
    images: set[Path] = set()
    if result.bad and benchmark.prepare is not None:
        result.notes.append(f"`clmoe data prepare {benchmark.name}` builds what can be built")
    for task in benchmark.tasks:
        _check_task(task, result, images, gold_problem)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's global lock
        result.bad += filter(None, pool.map(_image_problem, sorted(images)))
    result.lines.append(f"{len(images)} different images decoded")
    return result


def _check_task(task: Task, result: Checked, images: set[Path], gold_problem: GoldProblem) -> None:
    bad, trained, repeated, questions = len(result.bad), 0, 0, list[Question]()
    if task.train.is_file():
        for record in _until_broken(iterate_train(task.train, task.image_root, result.failed), result):
            trained += 1
            repeated += "#" in record.id
            if record.image is not None:
                images.add(task.image_root / record.image)
    if task.test.is_file():
        before = len(result.bad)
        rows = iterate_questions(task.test, task.image_root, result.failed, answered=task.gold is None)
        questions = list(_until_broken(rows, result))
        images.update(task.image_root / question.image for question in questions if question.image is not None)
        if task.gold is not None and len(result.bad) > before and READERS[task.gold.reader].whole:
            result.notes.append(f"{task.name}: expected answers are checked once all rows of the test file are good")
        elif task.gold is None or all(path.is_file() for path in task.gold.files):
            _check_answers(task, questions, result, gold_problem)
    if repeated:
        result.notes.append(f"{task.name}: {repeated} training ids hold a '#'; repeated ones are numbered #2, #3, ...")
    result.lines.append(f"{task.name:<16}{trained:>7} train {len(questions):>7} test {len(result.bad) - bad:>7} bad")


def _check_answers(task: Task, questions: list[Question], result: Checked, gold_problem: GoldProblem) -> None:
    try:
        completed = complete(task, questions, result.failed)
    except ClmoeError as error:  # of a gold file that cannot be read at all
        result.failed(error)
        return
    problems = (gold_problem(task.scorer, question) for question in completed)
    result.bad += [f"{task.test}: {problem}" for problem in problems if problem]
    if task.scorer == "vqa" and not all("answers" in question.extra for question in completed):
        result.notes.append(f"{task.name}: questions without ten annotators are scored by exact match")


def _until_broken(rows: Iterable[R], result: Checked) -> Iterator[R]:
    """The rows up to the point where the file itself cannot be read; that error is listed like a bad row."""
    try:
        yield from rows
    except ClmoeError as error:
        result.failed(error)


def _image_problem(path: Path) -> str | None:
    try:
        load_image(path)
    except ClmoeError as error:
        return str(error)
    return None
