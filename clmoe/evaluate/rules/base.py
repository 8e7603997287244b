"""What a scoring rule is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from clmoe.data.records import Question
from clmoe.errors import ClmoeError

Mode = Literal["fixed", "official"]
MODES: tuple[str, ...] = get_args(Mode)
Scorer = Callable[[str, Question, Mode], float]
"""A rule for one prediction: its score in [0, 1]."""


@dataclass(frozen=True)
class CorpusScore:
    """The score of a list of answers.

    Attributes:
        score: of the whole list, usually in [0, 1].
        rows: one figure per answer; ``score`` need not be their mean.
        parts: the figures that make up ``score``, if there are several.
    """

    score: float
    rows: list[float]
    parts: Mapping[str, float]


def unfit(question: Question, field: str, needed: str) -> ClmoeError:
    """The error for a question whose gold answer does not fit its rule."""
    value = question.answer if field == "answer" else question.extra.get(field)
    return ClmoeError(f"question {question.question_id}: field {field!r} is {value!r}, but its scorer needs {needed}")
