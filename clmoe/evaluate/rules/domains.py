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
    """Remote sensing and driving: an accepted answer stands in the prediction.

    `official` is eval_ai2d.py: nothing is right where the prediction contains "Unanswerable"; an answer with a blank
    in it is looked for as text; of another one full stops are removed, and in a prediction with a blank it needs a
    blank before it, or a blank, full stop or comma after it.
    """
    found = _has_words if mode == "fixed" else _official_words
    return float(any(found(prediction, gold) for gold in accepted(question)))


def contains_answer(prediction: str, question: Question, mode: Mode) -> float:
    """Medicine (PathVQA): an accepted answer stands in the prediction; `official` takes any piece of text."""
    found = _has_words if mode == "fixed" else _has_text
    return float(any(found(prediction, gold) for gold in accepted(question)))


def science(prediction: str, question: Question, mode: Mode) -> float:
    """Science: exact match for images of AI2D, TQA, VQA and SciVerse; MapQA's "Which states" gives partial credit.

    The source of a question is the beginning of its image's file name. For "Which states" the score is the share of
    the gold answer's comma-separated states that the prediction names, of several accepted answers the largest; other
    questions of MapQA want the answer in the prediction. `official` looks for each state, blanks included, anywhere in
    the prediction, so "Virginia" is found in "West Virginia"; `fixed` compares the members of the two lists.
    """
    golden = accepted(question)
    name = PurePosixPath(question.image or "").name
    if name.startswith(_EXACT_SOURCES):
        if mode == "fixed":
            return float(same_words(prediction, golden))
        return float(prediction.lower() in [gold.lower() for gold in golden])
    if "Which states" not in question.text:
        return contains_answer(prediction, question, mode)
    share = _named_states if mode == "fixed" else _official_states
    return max(share(prediction, gold) for gold in golden)


def stock(prediction: str, question: Question, mode: Mode) -> float:
    """Finance (StockQA): an option's letter, or yes or no.

    `official` removes blanks and full stops from the prediction and compares: "B. rising" becomes "brising", which is
    not "b". `fixed` reads letters as `option_letter` does.
    """
    golden = accepted(question)
    if mode == "official":
        return float(prediction.lower().replace(" ", "").replace(".", "") in [gold.lower() for gold in golden])
    letters = [gold.strip().upper() for gold in golden if re.fullmatch("[A-Za-z]", gold.strip())]
    words = [gold for gold in golden if gold.strip().upper() not in letters]
    return float(parse_letter(prediction) in letters or same_words(prediction, words))


def _official_words(prediction: str, gold: str) -> bool:
    """See `contains_words`."""
    if "Unanswerable" in prediction:
        return False
    text, gold = prediction.lower(), gold.lower()
    if " " not in gold:
        gold = gold.replace(".", "")
        if " " in text:
            return any(form in text for form in (f" {gold}", f"{gold} ", f"{gold}.", f"{gold},"))
    return gold in text


def _has_text(text: str, piece: str) -> bool:
    return piece.lower() in text.lower()


def _named_states(prediction: str, gold: str) -> float:
    wanted = _members(gold)
    return len(wanted & _members(prediction)) / len(wanted) if wanted else 0.0


def _official_states(prediction: str, gold: str) -> float:
    parts = gold.lower().split(",")
    return sum(part in prediction.lower() for part in parts) / len(parts)


def _has_words(text: str, words: str) -> bool:
    """``words`` stand in ``text``, case and trailing full stops aside, with no letter or digit next to them."""
    wanted = plain(words)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text.lower()) is not None


def _members(text: str) -> set[str]:
    """Comma-separated members; an "and" before the last one is no part of it."""
    return {plain(re.sub(r"^\s*and\s+", "", part)) for part in text.split(",")} - {""}
