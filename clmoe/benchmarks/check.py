"""`clmoe data check`: read every row and every image of a benchmark, and list what is bad."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clmoe.benchmarks.base import Benchmark, Task, complete
from clmoe.benchmarks.gold import READERS
from clmoe.data.images import load_image
from clmoe.data.records import Question, iterate_train, load_questions
from clmoe.errors import ClmoeError

GoldProblem = Callable[[str, Question], str | None]
"""``(scorer, question)``: what is wrong with the expected answer, or None."""


@dataclass
class Checked:
    """What was found: the counts of each task, what is no fault but worth knowing, and each bad row, image or file."""

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def failed(self, error: ClmoeError) -> None:
        self.bad.append(str(error))

    @contextmanager
    def listing(self) -> Iterator[None]:
        """List the error that ends the block: the file itself cannot be read."""
        try:
            yield
        except ClmoeError as error:
            self.failed(error)


def check_benchmark(benchmark: Benchmark, gold_problem: GoldProblem) -> Checked:
    """Read all rows, gold files and images (each image once); nothing bad stops the check."""
    result = Checked(bad=benchmark.missing_files())
    images: set[Path] = set()
    if result.bad and benchmark.prepare is not None:
        result.notes.append(f"`clmoe data prepare {benchmark.name}` builds what can be built")
    for task in benchmark.tasks:
        _check_task(task, result, images, gold_problem)
    paths = sorted(images)
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's global lock
        for start in range(0, len(paths), 4096):  # a waiting task takes more memory than a path
            result.bad += filter(None, pool.map(_image_problem, paths[start : start + 4096]))
    result.lines.append(f"{len(paths)} different images decoded")
    return result


def _check_task(task: Task, result: Checked, images: set[Path], gold_problem: GoldProblem) -> None:
    bad, trained, repeated, questions = len(result.bad), 0, 0, list[Question]()
    if task.train.is_file():
        with result.listing():
            for record in iterate_train(task.train, task.image_root, result.failed):
                trained += 1
                repeated += "#" in record.id
                if record.image:
                    images.add(task.image_root / record.image)
    if task.test.is_file():
        before = len(result.bad)
        with result.listing():
            questions = load_questions(task.test, task.image_root, result.failed, answered=task.gold is None)
        images.update(task.image_root / question.image for question in questions if question.image)
        if task.gold is not None and len(result.bad) > before and READERS[task.gold.reader].whole:
            result.notes.append(f"{task.name}: expected answers are checked once all rows of the test file are good")
        elif task.gold is None or all(path.is_file() for path in task.gold.files):
            with result.listing():
                completed = complete(task, questions, result.failed)
                problems = (gold_problem(task.scorer, question) for question in completed)
                result.bad += [f"{task.test}: {problem}" for problem in problems if problem]
                if task.scorer == "vqa" and not all("answers" in question.extra for question in completed):
                    result.notes.append(f"{task.name}: questions without ten annotators are scored by exact match")
    if repeated:
        result.notes.append(f"{task.name}: {repeated} training ids hold a '#'; repeated ones are numbered #2, #3, ...")
    result.lines.append(f"{task.name:<16}{trained:>7} train {len(questions):>7} test {len(result.bad) - bad:>7} bad")


def _image_problem(path: Path) -> str | None:
    try:
        load_image(path)
    except ClmoeError as error:
        return str(error)
    return None
