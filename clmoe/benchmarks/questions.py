"""A task's test questions with their expected answers, as evaluation asks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from clmoe.benchmarks.gold import READERS
from clmoe.data.permutation import epoch_permutation
from clmoe.data.records import load_questions

if TYPE_CHECKING:
    from clmoe.benchmarks.base import Task
    from clmoe.data.records import Failed, Question


def task_questions(task: Task, *, images: bool = True) -> list[Question]:
    """Read and validate the task's test file and gold files, and add the task's suffix to the questions.

    Args:
        images: False where only the rows matter: images need not exist.

    Raises:
        ClmoeError: naming file and row, or gold file and id.
    """
    return complete(task, load_questions(task.test, task.image_root, answered=task.gold is None, images=images))


def complete(task: Task, questions: Sequence[Question], failed: Failed | None = None) -> list[Question]:
    """The questions of a test file with the answers of the task's gold files and the task's suffix.

    With ``failed``, questions whose answer is not there are told to it and left out.
    """
    if task.gold is not None:
        questions = READERS[task.gold.reader].read(task.gold.files, questions, failed)
    return (
        [replace(question, text=question.text + task.suffix) for question in questions] if task.suffix else [*questions]
    )


def sampled(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """``limit`` of the questions, in their order; all of them with None.

    Which ones is a pure function of the number of questions: every stage of every run asks the same, and a smaller
    sample is part of a larger one. They are drawn from the whole file, because files are ordered by kind or difficulty.
    """
    return [questions[row] for row in sorted(epoch_permutation(0, 0, len(questions))[:limit].tolist())]
