"""What a scoring rule is, and how it reads a question's gold answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from clmoe.errors import ClmoeError

if TYPE_CHECKING:
    from clmoe.data.records import Question

Mode = Literal["fixed", "official"]
MODES: tuple[str, ...] = get_args(Mode)
Scorer = Callable[[str, "Question", Mode], float]
"""A rule that judges one answer: ``(prediction, question, mode)`` to a score in [0, 1]."""


@dataclass(frozen=True)
class CorpusScore:
    """What a rule makes of a whole list of answers.

    Attributes:
        score: of the list, usually in [0, 1]; not the mean of ``rows``.
        rows: one figure per answer, to find good and bad ones.
        parts: the figures that ``score`` was made of.
    """

    score: float
    rows: list[float]
    parts: Mapping[str, float]


CorpusScorer = Callable[[Sequence[str], Sequence["Question"]], CorpusScore]
"""A rule that judges a list of answers as a whole: ``(predictions, questions)``, aligned."""


def accepted(question: Question) -> list[str]:
    """The question's gold answer, or its list of accepted answers.

    Raises:
        ClmoeError: it has neither.
    """
    answers = [question.answer] if question.answer else question.extra.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ClmoeError(
            f"question {question.question_id}: no expected answer in field 'answer' (or 'answers'); mend the test file"
        )
    return answers


def shown_answer(question: Question) -> str:
    """What was expected, for people to read: the answer, the different accepted ones, the captions, or the box."""
    several = question.extra.get("answers") or question.extra.get("captions") or []
    box = question.extra.get("answer_bbox", "")
    return question.answer or " | ".join(dict.fromkeys(map(str, several))) or str(box)
