"""Rules of MLLM-DCL's five domains (remote sensing, driving, medicine, science, finance).

The published rules look for the gold answer as a piece of text anywhere in the prediction, so a short answer is found
where it was not given: "no" in "none", in "it is not". `fixed` looks for it as whole words.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from clmoe.evaluate.rules.base import Mode, accepted
from clmoe.evaluate.rules.letters import parse_letter
from clmoe.evaluate.rules.words import plain, same_words

if TYPE_CHECKING:
    from clmoe.data.records import Question

_EXACT_SOURCES = ("AI2D", "TQA", "VQA", "SciVerse")


def contains_words(prediction: str, question: Question, mode: Mode) -> float:
    """Remote sensing and driving: the answer stands in the prediction.

    `official` is eval_ai2d.py: nothing is right where the prediction contains "Unanswerable"; an answer with a blank
    in it is looked for as text; of another one full stops are removed, and in a prediction with a blank it needs a
    blank before it, or a blank, full stop or comma after it.
    """
    (gold,) = accepted(question)
    if mode == "fixed":
        return float(_has_words(prediction, gold))
    if "Unanswerable" in prediction:
        return 0.0
    text, gold = prediction.lower(), gold.lower()
    if " " not in gold:
        gold = gold.replace(".", "")
        if " " in text:
            return float(any(form in text for form in (f" {gold}", f"{gold} ", f"{gold}.", f"{gold},")))
    return float(gold in text)


def contains_answer(prediction: str, question: Question, mode: Mode) -> float:
    """Medicine (PathVQA): the answer stands in the prediction; `official` takes any piece of text."""
    (gold,) = accepted(question)
    return float(_has_words(prediction, gold) if mode == "fixed" else gold.lower() in prediction.lower())


def science(prediction: str, question: Question, mode: Mode) -> float:
    """Science: exact match for images of AI2D, TQA, VQA and SciVerse; MapQA's "Which states" gives partial credit.

    The source of a question is the beginning of its image's file name. For "Which states" the score is the share of
    the gold answer's comma-separated states that the prediction names; other questions of MapQA want the answer in
    the prediction. `official` looks for each state, blanks included, anywhere in the prediction, so "Virginia" is
    found in "West Virginia"; `fixed` compares the members of the two lists.
    """
    (gold,) = accepted(question)
    name = PurePosixPath(question.image or "").name
    if name.startswith(_EXACT_SOURCES):
        return float(same_words(prediction, [gold]) if mode == "fixed" else prediction.lower() == gold.lower())
    if "Which states" not in question.text:
        return contains_answer(prediction, question, mode)
    if mode == "official":
        parts = gold.lower().split(",")
        return sum(part in prediction.lower() for part in parts) / len(parts)
    wanted = _members(gold)
    return len(wanted & _members(prediction)) / len(wanted) if wanted else 0.0


def stock(prediction: str, question: Question, mode: Mode) -> float:
    """Finance (StockQA): an option's letter, or yes or no.

    `official` removes blanks and full stops from the prediction and compares: "B. rising" becomes "brising", which is
    not "b". `fixed` reads letters as `option_letter` does.
    """
    (gold,) = accepted(question)
    if mode == "official":
        return float(prediction.lower().replace(" ", "").replace(".", "") == gold.lower())
    if re.fullmatch("[A-Za-z]", gold.strip()):
        return float(parse_letter(prediction) == gold.strip().upper())
    return float(same_words(prediction, [gold]))


def _has_words(text: str, words: str) -> bool:
    """``words`` stand in ``text``, case and trailing full stops aside, with no letter or digit next to them."""
    wanted = plain(words)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text.lower()) is not None


def _members(text: str) -> set[str]:
    """Comma-separated members; an "and" before the last one is no part of it."""
    return {plain(re.sub(r"^\s*and\s+", "", part)) for part in text.split(",")} - {""}
