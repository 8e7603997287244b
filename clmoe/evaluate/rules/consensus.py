"""Rules for questions that ten people answered: VQA accuracy, with the answer normaliser of VQA's evaluation server."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING

from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.base import Mode
from clmoe.evaluate.rules.words import short_answer

if TYPE_CHECKING:
    from clmoe.data.records import Question

ANNOTATORS = 10
_ENOUGH = 3
"""This many other annotators with the same answer make it fully right."""

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"\.(?!\d)")
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've "
    "you'll you're you've"
)
# A contraction is recognised when one of its apostrophes was forgotten; the last entry is the original's own.
_FULL_FORMS = {
    form[:at] + form[at + 1 :]: form
    for form in _CONTRACTIONS.split()
    for at, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def textvqa(prediction: str, question: Question, mode: Mode) -> float:
    """TextVQA: VQA accuracy over the ten answers in `question.extra["answers"]`.

    The modes differ in one point: `fixed` never accepts a prediction without text, `official` does where an annotator's
    answer is empty after normalising ("the").

    Raises:
        ClmoeError: there are not exactly ten answers.
    """
    if mode == "fixed" and not prediction.strip():
        return 0.0
    return agreement(prediction, _ten_answers(question))


def vqa(prediction: str, question: Question, mode: Mode) -> float:
    """VQAv2 and CL4VQA.

    `official` is CoIN's and CL-MoE's rule: exact match with the one answer of the test file, case ignored. `fixed` is
    VQA accuracy where the ten annotators' answers are at hand (`question.extra["answers"]`), and `short_answer` where
    they are not.

    Raises:
        ClmoeError: there are annotators' answers, but not ten.
    """
    if mode == "official" or "answers" not in question.extra:
        return short_answer(prediction, question, mode)
    return textvqa(prediction, question, mode)


def agreement(prediction: str, answers: list[str]) -> float:
    """Mean over the annotators of min(1, equal answers of the others / 3), all normalised (VQA v2's evaluation)."""
    said = normalise(prediction)
    equal = [normalise(answer) == said for answer in answers]
    others = [sum(equal) - own for own in equal]
    return sum(min(1.0, count / _ENOUGH) for count in others) / len(others) if any(equal) else 0.0


@lru_cache(maxsize=2**16)  # annotators use few different answers
def normalise(text: str) -> str:
    """As VQA's evaluation server does it: lower case, no articles, digits for number words, no punctuation.

    A punctuation mark next to a blank vanishes, one between letters becomes a blank; full stops vanish except before
    a digit; forgotten apostrophes of contractions are put back, and the genitive's 's becomes a word. (The original
    stops after the 32nd full stop; this does not.)
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).split()]
    return " ".join(_FULL_FORMS.get(word, word) for word in words if word not in _ARTICLES)


def _ten_answers(question: Question) -> list[str]:
    answers = question.extra.get("answers")
    texts = [answer for answer in answers if isinstance(answer, str)] if isinstance(answers, list) else []
    if not isinstance(answers, list) or len(texts) != len(answers) or len(texts) != ANNOTATORS:
        raise ClmoeError(
            f"question {question.question_id}: field 'answers' holds {len(texts)} answers, but VQA accuracy needs "
            f"{ANNOTATORS}; give all annotators' answers or choose scorer 'short_answer'"
        )
    return texts
