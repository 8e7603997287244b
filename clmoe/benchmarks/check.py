"""Read all of a benchmark's data and list what is bad or odd (``clmoe data check``)."""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clmoe.benchmarks.base import Benchmark, Task, complete, images_missing
from clmoe.benchmarks.gold import READERS
from clmoe.data.formats import Kind, raw_rows
from clmoe.data.images import ending, load_image
from clmoe.data.records import Fits, Question, Rows, iterate_train, load_questions
from clmoe.data.rows import Seen, all_of, short
from clmoe.errors import ClmoeError

GoldProblem = Callable[[str, Question], str | None]
"""``(scorer, question)``: what is wrong with the expected answer, or None."""

ANSWERS_SHOWN = 5


@dataclass
class Checked:
    """What was found: the counts of each task, what is worth knowing but not a fault, and each bad row, image or file.

    ``inside``: names of images that are stored in rows and were decoded there.
    """

    lines: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    bad: list[ClmoeError] = field(default_factory=list)
    inside: set[str] = field(default_factory=set)

    def source(self, task: Task, kind: Kind) -> tuple[Path, Rows | None]:
        """The file that rows are read from, and its rows if it is in another format."""

        def keep(data: bytes) -> str:
            name = f"inside-{hashlib.sha256(data).hexdigest()}.{ending(data, decode=True)}"
            self.inside.add(name)
            return name

        if task.raw is None or not all(path.exists() for path in task.raw.files(kind)):
            return (task.train if kind == "train" else task.test), None
        return task.raw.files(kind)[0], raw_rows(task.raw, kind, keep)

    def report(self) -> list[str]:
        """What is bad, a line for each kind."""
        return str(all_of(self.bad)).splitlines()

    @contextmanager
    def listing(self) -> Iterator[None]:
        """List the error that ends the block, because the file itself cannot be read."""
        try:
            yield
        except ClmoeError as error:
            self.bad.append(error)

    def note(self, task: Task, file: Path, seen: Seen) -> None:
        """Note what reading a task's file found besides its bad rows."""
        problem = images_missing(task, file, seen)
        self.bad += [ClmoeError(problem)] if problem else []
        self.notes += [f"{task.name}: {file.name}: {line}" for line in seen.notes()]


def check_benchmark(
    benchmark: Benchmark, gold_problem: GoldProblem, tasks: Collection[str] | None = None, fits: Fits | None = None
) -> Checked:
    """Read all rows, gold files and images (each image once) of these ``Benchmark.sets``; no fault stops the check.

    ``fits`` judges the length of training records; with None, nothing does.
    """
    result = Checked(bad=[ClmoeError(line) for line in benchmark.missing_files(tasks)])
    images: set[Path] = set()
    if result.bad and benchmark.prepare is not None:
        result.notes.append(f"`clmoe data prepare {benchmark.name}` builds what can be built")
    for task in benchmark.sets(tasks):
        _check_task(task, result, images, gold_problem, fits)
    paths = sorted(images)
    with ThreadPoolExecutor() as pool:  # Pillow releases Python's global lock while decoding
        for start in range(0, len(paths), 4096):  # a waiting task takes more memory than a path
            result.bad += filter(None, pool.map(_image_problem, paths[start : start + 4096]))
    result.lines.append(f"{len(paths) + len(result.inside)} different images decoded")
    return result


def _check_task(task: Task, result: Checked, images: set[Path], gold_problem: GoldProblem, fits: Fits | None) -> None:
    before, trained, repeated, questions = len(result.bad), 0, 0, list[Question]()
    asked: set[int] = set()  # hashes: a benchmark has a million questions
    file, rows = (task.train, None) if task.general else result.source(task, "train")
    if rows is not None or (file.is_file() and not task.general):
        seen = Seen()
        with result.listing():
            for record in iterate_train(file, task.image_root, result.bad.append, fits=fits, seen=seen, rows=rows):
                trained += 1
                repeated += "#" in record.id
                asked.add(hash((record.image, record.turns[0].question)))
                if record.image and record.image not in result.inside:
                    images.add(task.image_root / record.image)
            result.note(task, file, seen)
    file, rows = result.source(task, "test")
    if rows is not None or file.is_file():
        questions = _check_questions(task, file, rows, result, gold_problem)
        named = {question.image for question in questions if question.image} - result.inside
        images.update(task.image_root / image for image in named)
        shared = [q.question_id for q in questions if hash((q.image, q.text)) in asked]
        if shared:
            of = f"{len(shared)} of {len(questions)} test questions are also in the training file, with the same image"
            result.notes.append(f"{task.name}: {of}, question_id {short(shared[0])!r} for instance")
    if repeated:
        result.notes.append(f"{task.name}: {repeated} training ids hold a '#'; repeated ones are numbered #2, #3, ...")
    bad = len(result.bad) - before
    result.lines.append(f"{task.name:<16}{trained:>7} train {len(questions):>7} test {bad:>7} bad")


def _check_questions(
    task: Task, file: Path, rows: Rows | None, result: Checked, gold_problem: GoldProblem
) -> list[Question]:
    """The test file's good rows, checked with their expected answers."""
    before, seen, questions = len(result.bad), Seen(), list[Question]()
    with result.listing():
        known = task.gold is None
        questions = load_questions(file, task.image_root, result.bad.append, answered=known, seen=seen, rows=rows)
        result.note(task, file, seen)
    if task.gold is not None and len(result.bad) > before and READERS[task.gold.reader].whole:
        result.notes.append(f"{task.name}: expected answers are checked once all rows of the test file are good")
    elif task.gold is None or all(path.is_file() for path in task.gold.files):
        with result.listing():
            completed = complete(task, questions, result.bad.append)
            try:
                problems = [gold_problem(task.scorer, question) for question in completed]
            except ClmoeError as error:
                raise ClmoeError(f"task {task.name!r}, field 'scorer': {error}") from error
            result.bad += [ClmoeError(f"{file}: {problem}") for problem in problems if problem]
            if task.scorer == "vqa" and not all("answers" in question.extra for question in completed):
                result.notes.append(f"{task.name}: questions without ten annotators are scored by exact match")
            result.notes += [f"{task.name}: {line}" for line in _answers(completed)]
    return questions


def _answers(questions: list[Question]) -> Iterator[str]:
    """How often each expected answer occurs; where several are accepted, the most frequent counts."""
    several = ((question.answer, question.extra.get("answers")) for question in questions)
    golden = [
        [answer] if answer else list(map(str, more)) if isinstance(more, list) else [] for answer, more in several
    ]
    counts = Counter(Counter(answers).most_common(1)[0][0].strip() for answers in golden if answers)
    if not counts:
        return
    most = counts.most_common(ANSWERS_SHOWN)
    rest = [f"{len(counts) - len(most)} others"] if len(counts) > len(most) else []
    answers = ", ".join([*(f"{short(answer)!r} {number}" for answer, number in most), *rest])
    share = f"always answering {short(most[0][0])!r} gives {100 * most[0][1] / counts.total():.1f} %"
    yield f"test answers: {answers}; {share}"


def _image_problem(path: Path) -> ClmoeError | None:
    try:
        load_image(path)
    except ClmoeError as error:
        return error
    return None
