"""Rules that read the letter of an option."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.base import Mode

if TYPE_CHECKING:
    from clmoe.data.records import Question

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
