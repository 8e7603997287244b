"""Questions to begin with: the first test rows of the tasks that a checkpoint has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from clmoe.benchmarks.base import Benchmark, task_questions
from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.base import shown_answer


@dataclass(frozen=True)
class Example:
    """A test question: its task, the path of its image, its text, and the expected answer."""

    task: str
    image: str | None
    question: str
    answer: str


def read_examples(benchmark: Benchmark, learned: Sequence[str], per_task: int = 2) -> list[Example]:
    """The first ``per_task`` test questions of every learned task.

    Raises:
        ClmoeError: the benchmark holds none of the tasks, or a file is missing or malformed.
    """
    tasks = [task for task in benchmark.tasks if task.name in learned]
    if not tasks:
        raise ClmoeError(f"benchmark {benchmark.name} has none of the checkpoint's tasks ({', '.join(learned)})")
    examples = []
    for task in tasks:
        for question in task_questions(task)[:per_task]:
            image = None if question.image is None else str(task.image_root / question.image)
            examples.append(Example(task.name, image, question.text, shown_answer(question)))
    return examples
