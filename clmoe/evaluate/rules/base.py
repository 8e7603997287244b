"""What a scoring rule is, and how it reads a question's gold answer."""

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


def accepted(question: Question) -> list[str]:
    """The gold answer, or the list of accepted ones. Raises ClmoeError if there is neither."""
    answers = [question.answer] if question.answer else question.extra.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise unfit(question, "answers", "a list of texts here, or one in field 'answer'")
    return answers


def shown_answer(question: Question) -> str:
    """The expected answer for people to read: the answer, the accepted ones, the captions, or the box."""
    several = question.extra.get("answers") or question.extra.get("captions") or []
    return question.answer or " | ".join(dict.fromkeys(map(str, several))) or str(question.extra.get("answer_bbox", ""))
