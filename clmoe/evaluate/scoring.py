"""Scoring rules: one short function per rule, one row in `SCORERS`.

Every scorer has two modes. `fixed` scores what the metric means. `official` reproduces what the public
evaluation script of CoIN computes, faults included, so that published tables can be compared with; it is
never the default. A scorer judges one question; `accuracy` averages over a question file.

To add a rule: write `def my_rule(prediction, question, mode) -> float` and add it to `SCORERS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fractions import Fraction
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args

from clmoe.errors import ClmoeError

if TYPE_CHECKING:
    from clmoe.data.records import Question

Mode = Literal["fixed", "official"]
MODES: tuple[str, ...] = get_args(Mode)
Scorer = Callable[[str, "Question", Mode], float]
Box = tuple[Fraction, Fraction, Fraction, Fraction]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_FOUR_NUMBERS = r"\s*,\s*".join([f"({_NUMBER})"] * 4)
_BARE_BOX = re.compile(rf"\s*{_FOUR_NUMBERS}\s*\.?\s*", re.ASCII)
_BRACKETED_BOX = re.compile(rf"\s*\[\s*{_FOUR_NUMBERS}\s*\]\s*\.?\s*", re.ASCII)

# Read in this order. A lone letter may be lower case; inside a sentence only a capital counts, and an
# unmarked "A" or "I" followed by another word is the article or the pronoun, not an option.
_LONE_LETTER = re.compile(r"\(?([A-Za-z])\)?[.,:;]?", re.ASCII)
_LEADING_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])[.,:)])(?=\s)", re.ASCII)
_NAMED_LETTER = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+(?i:is))?\s*:?\s*"
    r"(?:\(([A-Za-z])\)|([A-Z])(?=\s*(?:[.,:;!)]|$))|([B-HJ-Z])(?=\s))",
    re.ASCII,
)
_OFFICIAL_OPTIONS = ("A", "B", "C", "D", "E")


def short_answer(prediction: str, question: Question, mode: Mode) -> float:
    """Exact match with `question.answer`, surrounding blanks and case ignored.

    `fixed` also ignores trailing full stops ("Mug." equals "mug") and never accepts an empty prediction.
    `official` is the rule of CoIN's VizWiz and VQAv2 scripts: no punctuation is removed.
    """
    if mode == "official":
        return float(prediction.strip().lower() == question.answer.strip().lower())
    return float(bool(prediction.strip()) and _plain(prediction) == _plain(question.answer))


def option_letter(prediction: str, question: Question, mode: Mode) -> float:
    """Multiple choice: the letter named by the prediction equals `question.answer`.

    `fixed` reads "B", "b.", "(B)", "B. text", "The answer is B." and "Option B"; it does not take the article
    in "A dog" for option A. `official` is CoIN's ScienceQA rule: an exact "A" to "E", or a leading "B. ", or
    else the first one-character word of the text, upper-cased, whatever it is.

    Raises:
        ClmoeError: the gold answer is not a single letter.
    """
    gold = question.answer.strip().upper()
    if not re.fullmatch("[A-Z]", gold):
        raise ClmoeError(
            f"question {question.question_id}: field 'answer' is {question.answer!r}, but scorer "
            "'option_letter' needs one letter; mend the test file or choose 'short_answer'"
        )
    read = official_letter if mode == "official" else parse_letter
    return float(read(prediction) == gold)


def iou(prediction: str, question: Question, mode: Mode) -> float:
    """Visual grounding: 1 if the boxes' intersection over union is strictly above 0.5, else 0.

    Boxes are `[x1, y1, x2, y2]` in fractions of the image padded to a square. The gold box is
    `question.extra["answer_bbox"]`, a string or a list. The side of the padded image, max of
    `question.extra["size"]` where given, scales both boxes alike and so cannot change the ratio.
    `fixed` computes in exact fractions of the printed decimals; a malformed or inverted box is wrong.
    `official` keeps CoIN's parser, which cuts off the first and the last character of the coordinates.

    Raises:
        ClmoeError: `answer_bbox` is missing or malformed.
    """
    gold = _gold_box(question)
    if mode == "fixed":
        box = parse_box(prediction)
        return float(box is not None and _overlap(box, gold) > Fraction(1, 2))
    cut = official_box(prediction)
    if cut is None:
        return 0.0
    side = max(question.extra.get("size") or [1])
    scaled = tuple(value * side for value in cut)
    return float(_overlap(scaled, tuple(float(value) * side for value in gold)) > 0.5)


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "short_answer": short_answer,
        "option_letter": option_letter,
        "iou": iou,
    }
)


def score(scorer: str, prediction: str, question: Question, mode: Mode = "fixed") -> float:
    """Score one prediction, in [0, 1], by the rule named `scorer`.

    Raises:
        ClmoeError: the scorer or the mode is unknown, or the question's gold answer does not fit the rule.
    """
    if mode not in MODES:
        raise ClmoeError(f"unknown scoring mode {mode!r}; choose one of {', '.join(MODES)}")
    return find_scorer(scorer)(prediction, question, mode)


def find_scorer(name: str) -> Scorer:
    """The scorer of that name; ClmoeError names the nearest known one."""
    if name in SCORERS:
        return SCORERS[name]
    nearest = get_close_matches(name, SCORERS, n=1, cutoff=0.0)[0]
    raise ClmoeError(f"unknown scorer {name!r}; did you mean {nearest!r}? Known: {', '.join(SCORERS)}")


def accuracy(scorer: str, predictions: Mapping[str, str], questions: Sequence[Question], mode: Mode = "fixed") -> float:
    """Mean score in percent over the question file: a question without a prediction counts as wrong.

    Args:
        predictions: answer text by question id. Ids are compared as strings, so 5 and "5" are the same.

    Raises:
        ClmoeError: no questions, a prediction for an unknown question, or what `score` raises.
    """
    if not questions:
        raise ClmoeError("there are no questions to score; check the task's test file")
    by_id = {str(key): text for key, text in predictions.items()}
    strangers = by_id.keys() - {str(question.question_id) for question in questions}
    if strangers:
        raise ClmoeError(
            f"{len(strangers)} prediction(s) answer no question of this test file, e.g. question_id "
            f"{min(strangers)!r}; the predictions belong to another file"
        )
    total = 0.0
    for question in questions:
        prediction = by_id.get(str(question.question_id))
        total += 0.0 if prediction is None else score(scorer, prediction, question, mode)
    return 100.0 * total / len(questions)


def parse_letter(text: str) -> str | None:
    """The option letter (upper case) an answer names, or None. The rule is described at `option_letter`."""
    text = text.strip()
    match = _LONE_LETTER.fullmatch(text) or _LEADING_LETTER.match(text) or _NAMED_LETTER.search(text)
    return match[match.lastindex].upper() if match and match.lastindex else None


def official_letter(text: str) -> str | None:
    """The option letter as CoIN's ScienceQA script reads it: a stray "a" or the "s" of "it's" counts."""
    if text in _OFFICIAL_OPTIONS:
        return text
    if text[:1] in _OFFICIAL_OPTIONS and text[1:3] == ". ":
        return text[0]
    word = re.search(r"\b\w\b", text)
    letter = word[0].upper() if word else ""
    return letter if letter in _OFFICIAL_OPTIONS else None


def parse_box(text: str) -> Box | None:
    """Read `[x1, y1, x2, y2]` (brackets optional, nothing else around it), exactly; None if malformed.

    A box without area (x2 <= x1 or y2 <= y1) is malformed.
    """
    match = _BRACKETED_BOX.fullmatch(text) or _BARE_BOX.fullmatch(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (Fraction(number) for number in match.groups())
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def official_box(text: str) -> tuple[float, float, float, float] | None:
    """Read a box as CoIN's grounding script does: brackets removed, then one more character cut at each end.

    "[0.12, 0.30, 0.50, 0.94]" becomes (.12, .30, .50, .9); a leading "1.00" becomes 0.0.
    """
    inner = text.removeprefix(" ").replace("[", "").replace("]", "")[1:-1]
    try:
        x1, y1, x2, y2 = (float(part) for part in inner.split(","))
    except ValueError:
        return None
    return x1, y1, x2, y2


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".").rstrip()


def _gold_box(question: Question) -> Box:
    gold = question.extra.get("answer_bbox")
    text = gold if isinstance(gold, str) else ", ".join(map(str, gold)) if isinstance(gold, list) else ""
    box = parse_box(text)
    if box is None:
        raise ClmoeError(
            f"question {question.question_id}: field 'answer_bbox' is {gold!r}, but scorer 'iou' needs "
            '"[x1, y1, x2, y2]" with x1 < x2 and y1 < y2, in fractions of the square-padded image'
        )
    return box


def _overlap(a: Sequence[Fraction | float], b: Sequence[Fraction | float]) -> Fraction | float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 where the union has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = width * height if width > 0 and height > 0 else 0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0
