"""The rule for multiple choice, which reads the letter of an option."""

import re

from clmoe.data.records import Question
from clmoe.evaluate.rules.base import Mode, unfit

# Tried in this order. A lone letter may be lower case. Within a sentence only a capital counts, and an unmarked "A" or
# "I" before another word is the article or the pronoun.
_LONE_LETTER = re.compile(r"\(?([A-Za-z])\)?[.,:;]?", re.ASCII)
_LEADING_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Z])[.,:)])(?=\s)", re.ASCII)
_NAMED_LETTER = re.compile(
    r"\b(?i:answer|option|choice)(?:\s+(?i:is))?\s*:?\s*"
    r"(?:\(([A-Za-z])\)|([A-Z])(?=\s*(?:[.,:;!)]|$))|([B-HJ-Z])(?=\s))",
    re.ASCII,
)


def option_letter(prediction: str, question: Question, mode: Mode) -> float:
    """Multiple choice: the prediction names the letter ``question.answer``.

    ``fixed`` reads "B", "b.", "(B)", "B. text", "The answer is B." and "Option B"; it does not take the article in
    "A dog" for option A. ``official`` is CoIN's ScienceQA rule: an exact "A" to "E", or a leading "B. ", or else the
    first one-character word, upper-cased, whatever it is.
    """
    gold = question.answer.strip().upper()
    if not re.fullmatch("[A-Z]", gold):
        raise unfit(question, "answer", "one letter; 'short_answer' takes any text")
    return float((parse_letter if mode == "fixed" else official_letter)(prediction) == gold)


def parse_letter(text: str) -> str | None:
    """The option letter (upper case) that an answer names, or None."""
    text = text.strip()
    match = _LONE_LETTER.fullmatch(text) or _LEADING_LETTER.match(text) or _NAMED_LETTER.search(text)
    return match[match.lastindex].upper() if match and match.lastindex else None


def official_letter(text: str) -> str | None:
    """The option letter as CoIN's ScienceQA script reads it: a stray "a" counts, and so does the "s" of "it's"."""
    if text[:1] in tuple("ABCDE") and (len(text) == 1 or text[1:3] == ". "):
        return text[0]
    word = re.search(r"\b\w\b", text)
    return word[0].upper() if word and word[0].upper() in tuple("ABCDE") else None
