"""Scoring: the rules by name, and what they make of a task's answers.

Every rule has two modes. `fixed` scores what the metric means. `official` reproduces what the public evaluation
script of the benchmark computes, faults included, so that published tables can be compared with; it is never the
default. The rules themselves are in `clmoe/evaluate/rules/`, one short function each.

Some faults of the published scripts lie in how they read a *file* of answers: ImageNet and captions are paired with
the questions by position, and most divide by the number of lines. In an evaluation by this package they cannot
occur, since there is one answer for each question of the test file, in its order. `score_file` reproduces them for
answers that were written elsewhere.

To add a rule: write `def my_rule(prediction, question, mode) -> float` and add it to `SCORERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.base import MODES, CorpusScore, CorpusScorer, Mode, Scorer
from clmoe.evaluate.rules.boxes import iou
from clmoe.evaluate.rules.captions import captions, references, require_captions
from clmoe.evaluate.rules.consensus import textvqa, vqa
from clmoe.evaluate.rules.domains import contains_answer, contains_words, science, stock
from clmoe.evaluate.rules.letters import option_letter
from clmoe.evaluate.rules.words import class_name, gqa, ocr_vqa, short_answer

if TYPE_CHECKING:
    from clmoe.data.records import Question

__all__ = ["MODES", "Mode", "Scorer"]

SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "short_answer": short_answer,
        "option_letter": option_letter,
        "iou": iou,
        "vqa": vqa,
        "textvqa": textvqa,
        "class_name": class_name,
        "gqa": gqa,
        "ocr_vqa": ocr_vqa,
        "contains_words": contains_words,
        "contains_answer": contains_answer,
        "science": science,
        "stock": stock,
    }
)
CORPUS_SCORERS: Mapping[str, CorpusScorer] = MappingProxyType({"captions": captions})
"""Rules that need all answers of a task at once; the same in both modes."""


@dataclass(frozen=True)
class PublishedScript:
    """How a rule's published script reads a file of answers.

    Attributes:
        pairs_by: a line's question is the one with its id, or the one at its position.
        divides_by: the number of lines in the file of answers, or of questions.
        prints_samples: what it prints as the number of samples, where that is not the divisor.
    """

    pairs_by: Literal["id", "position"] = "id"
    divides_by: Literal["lines", "questions"] = "lines"
    prints_samples: int | None = None


PUBLISHED_SCRIPTS: Mapping[str, PublishedScript] = MappingProxyType(
    {
        "option_letter": PublishedScript(divides_by="questions"),  # ScienceQA counts all ids of the split
        "gqa": PublishedScript(divides_by="questions"),
        "class_name": PublishedScript(pairs_by="position"),
        "captions": PublishedScript(pairs_by="position"),
        "ocr_vqa": PublishedScript(prints_samples=0),  # the length of a list that is never filled
    }
)


@dataclass(frozen=True)
class FileScore:
    """Score in percent, and the number of samples that it is said to be of."""

    percent: float
    samples: int


def score(scorer: str, prediction: str, question: Question, mode: Mode = "fixed") -> float:
    """Score one prediction, in [0, 1], by the rule named `scorer`.

    Raises:
        ClmoeError: the scorer or the mode is unknown, or the question's gold answer does not fit the rule.
    """
    _check_mode(mode)
    return find_scorer(scorer)(prediction, question, mode)


def find_scorer(name: str) -> Scorer:
    """The rule of that name for one answer; ClmoeError names the nearest known one."""
    if name in CORPUS_SCORERS:
        raise ClmoeError(f"scorer {name!r} judges all answers of a task at once, not one")
    _check_known(name)
    return SCORERS[name]


def check_scorer(name: str) -> None:
    """The scorer exists and can run here.

    Raises:
        ClmoeError: unknown name (the nearest is named), or something has to be installed first.
    """
    _check_known(name)
    if name == "captions":
        require_captions()


def gold_problem(scorer: str, question: Question) -> str | None:
    """What makes the question unanswerable under its rule: nothing, not even the gold answer, would be right.

    Raises:
        ClmoeError: unknown scorer.
    """
    _check_known(scorer)
    if scorer == "captions":
        return None if question.extra.get("captions") else f"question {question.question_id}: no reference captions"
    box = question.extra.get("answer_bbox")
    several = question.extra.get("answers")
    golden = [question.answer, *(several if isinstance(several, list) else []), str(box)]
    try:
        if any(score(scorer, str(answer), question) > 0 for answer in golden):
            return None
    except ClmoeError as error:
        return str(error)
    shown = question.answer or question.extra.get("answers")
    return f"question {question.question_id}: scorer {scorer!r} would take no answer for {shown!r}, not even itself"


def check_gold(scorer: str, questions: Sequence[Question], mode: Mode = "fixed") -> None:
    """Every question can be scored, whatever the answers will be.

    A question that no answer would get right (see `gold_problem`) can be: published test files hold some, and their
    scores count them.

    Raises:
        ClmoeError: names the question and what its gold answer lacks, or is what `check_scorer` raises.
    """
    _check_mode(mode)
    check_scorer(scorer)
    for question in questions:
        if scorer in CORPUS_SCORERS:
            references(question)
        else:
            SCORERS[scorer]("?", question, mode)  # a rule reads the gold answer for any text, but not for none


def score_answers(
    scorer: str, predictions: Sequence[str], questions: Sequence[Question], mode: Mode = "fixed"
) -> CorpusScore:
    """Score a task's answers, one for each question, aligned.

    Raises:
        ClmoeError: no questions, unequal lengths, or what `score` and `check_scorer` raise.
    """
    _check_mode(mode)
    if not questions:
        raise ClmoeError("there are no questions to score; check the task's test file")
    if len(predictions) != len(questions):
        raise ClmoeError(f"{len(predictions)} answers for {len(questions)} questions: an answer was lost")
    check_scorer(scorer)
    if scorer in CORPUS_SCORERS:
        return CORPUS_SCORERS[scorer](predictions, questions)
    rule = SCORERS[scorer]
    rows = [rule(prediction, question, mode) for prediction, question in zip(predictions, questions, strict=True)]
    return CorpusScore(sum(rows) / len(rows), rows, {})


def score_file(
    scorer: str, lines: Sequence[tuple[str | int, str]], questions: Sequence[Question], mode: Mode = "fixed"
) -> FileScore:
    """Score a file of answers that may be short of lines or in another order.

    `fixed` finds each line's question by its id and counts every question: one without a line is wrong. `official`
    does what the scorer's published script does (see `PUBLISHED_SCRIPTS`). Some of those stop at ids that are numbers
    in one file and text in the other; that is not reproduced, as no figure comes of it.

    Args:
        lines: question id and answer, in file order. Ids are compared as text, so 5 and "5" are the same.

    Raises:
        ClmoeError: no questions, a line for an unknown question, two lines for one, or what `score_answers` raises.
    """
    check_scorer(scorer)
    script = PUBLISHED_SCRIPTS.get(scorer, PublishedScript())
    by_id = _by_id(lines, questions)
    asked = {str(question.question_id): question for question in questions}
    if mode == "fixed" or script.divides_by == "questions":
        # "" is never right under these rules
        texts = [by_id.get(name, "") for name in asked]
        return FileScore(100 * score_answers(scorer, texts, questions, mode).score, len(questions))
    if not lines:
        raise ClmoeError("the file of answers is empty; published scripts divide by its length")
    paired = list(questions[: len(lines)]) if script.pairs_by == "position" else [asked[name] for name in by_id]
    result = score_answers(scorer, [text for _, text in lines], paired, mode)
    samples = len(lines) if script.prints_samples is None else script.prints_samples
    return FileScore(100 * result.score, samples)


def _by_id(lines: Sequence[tuple[str | int, str]], questions: Sequence[Question]) -> dict[str, str]:
    """Answers by question id, in the lines' order."""
    by_id: dict[str, str] = {}
    for number, (name, text) in enumerate(lines, 1):
        if str(name) in by_id:
            raise ClmoeError(f"line {number}: question_id {name!r} was answered before; keep one of the lines")
        by_id[str(name)] = text
    strangers = by_id.keys() - {str(question.question_id) for question in questions}
    if strangers:
        raise ClmoeError(
            f"{len(strangers)} prediction(s) answer no question of this test file, e.g. question_id "
            f"{min(strangers)!r}; the predictions belong to another file"
        )
    return by_id


def _check_known(name: str) -> None:
    known = [*SCORERS, *CORPUS_SCORERS]
    if name not in known:
        nearest = get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ClmoeError(f"unknown scorer {name!r}; did you mean {nearest!r}? Known: {', '.join(known)}")


def _check_mode(mode: str) -> None:
    if mode not in MODES:
        raise ClmoeError(f"unknown scoring mode {mode!r}; choose one of {', '.join(MODES)}")
