"""The scoring rules by name, and the score of a task's answers.

Every rule has two modes. ``fixed``, the default, scores what the metric means. ``official`` computes what the
benchmark's published script computes, faults included; ``scripts/score.py`` adds those of reading a file of answers.
"""

from collections.abc import Sequence

from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.rules import words
from clmoe.evaluate.rules.base import MODES, CorpusScore, Mode, Scorer
from clmoe.evaluate.rules.boxes import iou
from clmoe.evaluate.rules.captions import captions, references, require_captions
from clmoe.evaluate.rules.consensus import textvqa, vqa
from clmoe.evaluate.rules.letters import option_letter
from clmoe.utils.names import unknown

SCORERS: dict[str, Scorer] = {
    "short_answer": words.short_answer,
    "option_letter": option_letter,
    "iou": iou,
    "vqa": vqa,
    "textvqa": textvqa,
    "class_name": words.class_name,
    "gqa": words.gqa,
    "ocr_vqa": words.ocr_vqa,
    "contains_words": words.contains_words,
    "contains_answer": words.contains_answer,
    "science": words.science,
    "stock": words.stock,
}
CAPTIONS = "captions"
"""The one rule that needs all answers of a task at once; the same in both modes."""


def check_scorer(name: str, mode: Mode = "fixed") -> None:
    """Raise ClmoeError if there is no such scorer or mode, or if the scorer needs something that is not installed."""
    _check_name(name)
    if mode not in MODES:
        raise ClmoeError(unknown("scoring mode", mode, MODES))
    if name == CAPTIONS:
        require_captions()


def gold_problem(scorer: str, question: Question) -> str | None:
    """Why no answer to the question, not even its gold answer, can be right under this rule; None if one can."""
    several = question.extra.get("answers")
    golden = [question.answer, *(several if isinstance(several, list) else []), question.extra.get("answer_bbox")]
    _check_name(scorer)
    try:
        if scorer == CAPTIONS:
            references(question)
            return None
        if any(SCORERS[scorer](str(answer), question, "fixed") > 0 for answer in golden):
            return None
    except ClmoeError as error:
        return str(error)
    shown = question.answer or several
    return f"question {question.question_id}: scorer {scorer!r} would take no answer for {shown!r}, not even itself"


def check_gold(scorer: str, questions: Sequence[Question], mode: Mode = "fixed") -> None:
    """Raise ClmoeError, naming the question, unless all can be scored, whatever the answers.

    A question that no answer gets right (see ``gold_problem``) passes: published scores count such questions.
    """
    check_scorer(scorer, mode)
    for question in questions:
        if scorer == CAPTIONS:
            references(question)
        else:
            SCORERS[scorer]("?", question, mode)  # not "": for that, a rule may not read the gold answer


def score_answers(
    scorer: str, predictions: Sequence[str], questions: Sequence[Question], mode: Mode = "fixed"
) -> CorpusScore:
    """Score a task's answers, one for each question, aligned.

    Raises:
        ClmoeError: no questions, or as ``check_gold``.
        ValueError: unequal lengths.
    """
    check_scorer(scorer, mode)
    if not questions:
        raise ClmoeError("there are no questions to score; check the task's test file")
    if scorer == CAPTIONS:
        return captions(predictions, questions)
    rows = [SCORERS[scorer](text, question, mode) for text, question in zip(predictions, questions, strict=True)]
    return CorpusScore(sum(rows) / len(rows), rows, {})


def shown_answer(question: Question) -> str:
    """The expected answer for people to read: the answer, the accepted ones, the captions, or the box."""
    several = question.extra.get("answers") or question.extra.get("captions") or []
    return question.answer or " | ".join(dict.fromkeys(map(str, several))) or str(question.extra.get("answer_bbox", ""))


def _check_name(scorer: str) -> None:
    if scorer not in (*SCORERS, CAPTIONS):
        raise ClmoeError(unknown("scorer", scorer, (*SCORERS, CAPTIONS)))
