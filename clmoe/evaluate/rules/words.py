"""Rules that compare short answers as text: as a whole, or as words within the prediction.

MLLM-DCL's published rules (``contains_...``, ``science``) look for the gold answer anywhere in the prediction and find
"no" in "none" and in "it is not". Their ``fixed`` versions look for whole words.
"""

import re
from collections.abc import Callable
from pathlib import PurePosixPath

from clmoe.data.records import Question
from clmoe.evaluate.rules.base import Mode, Scorer, unfit
from clmoe.evaluate.rules.letters import parse_letter

Match = Callable[[str, str], bool]
"""``(prediction, gold answer)``"""


def accepted(question: Question) -> list[str]:
    """The gold answer, or the list of accepted ones. Raises ClmoeError if there is neither."""
    answers = [question.answer] if question.answer else question.extra.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise unfit(question, "answers", "a list of texts here, or one in field 'answer'")
    return answers


def any_matches(fixed: Match, official: Match) -> Scorer:
    """The rule that the prediction matches one of the accepted answers."""

    def rule(prediction: str, question: Question, mode: Mode) -> float:
        matches = official if mode == "official" else fixed
        return float(any(matches(prediction, gold) for gold in accepted(question)))

    return rule


def same_words(text: str, gold: str) -> bool:
    """Equal, ignoring case, surrounding blanks and trailing full stops ("Mug." is "mug"); nothing equals silence."""
    return bool(_plain(text)) and _plain(text) == _plain(gold)


def has_words(text: str, gold: str) -> bool:
    """``gold`` occurs with no letter or digit next to it, ignoring case and trailing full stops."""
    wanted = _plain(gold)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text.lower()) is not None


def official_words(text: str, gold: str) -> bool:
    """MLLM-DCL's eval_ai2d.py: a word needs a blank on one side, or a full stop or comma after it; a phrase nothing."""
    if "Unanswerable" in text:
        return False
    text, gold = text.lower(), gold.lower()
    if " " not in gold:
        gold = gold.replace(".", "")
        if " " in text:
            return any(form in text for form in (f" {gold}", f"{gold} ", f"{gold}.", f"{gold},"))
    return gold in text


short_answer = any_matches(same_words, lambda text, gold: text.upper() == gold.upper())
"""Exact match. ``official`` is the rule of CoIN's VizWiz and VQAv2 scripts and of UCIT's: it strips nothing."""

class_name = any_matches(same_words, lambda text, gold: text in gold or gold in text)
"""Name of the object in the image (CoIN's ImageNet). ``official`` takes "cat" for "catamaran", and "" for anything."""

gqa = any_matches(same_words, lambda text, gold: text.rstrip(".").lower() == gold)
"""GQA. ``official`` lower-cases the prediction only, so that nothing matches a gold answer with a capital."""

ocr_vqa = any_matches(same_words, lambda text, gold: "Unanswerable" not in text and text.lower() == gold.lower())
"""OCR-VQA. ``official`` strips nothing, and takes no "Unanswerable"."""

contains_words = any_matches(has_words, official_words)
"""Remote sensing and driving: the prediction contains the answer."""

contains_answer = any_matches(has_words, lambda text, gold: gold.lower() in text.lower())
"""Medicine (PathVQA): the prediction contains the answer; for ``official``, as any piece of text."""

_exact_source = any_matches(same_words, lambda text, gold: text.lower() == gold.lower())


def science(prediction: str, question: Question, mode: Mode) -> float:
    """Science: exact match for images of AI2D, TQA, VQA and SciVerse; MapQA's "Which states" gives partial credit.

    For "Which states" the score is the share of the gold states that the prediction names. ``official`` looks for each,
    blanks included, anywhere in the prediction and so finds "Virginia" in "West Virginia"; ``fixed`` compares the
    lists. MapQA's other questions follow ``contains_answer``.
    """
    if PurePosixPath(question.image or "").name.startswith(("AI2D", "TQA", "VQA", "SciVerse")):
        return _exact_source(prediction, question, mode)
    if "Which states" not in question.text:
        return contains_answer(prediction, question, mode)
    share = _named_states if mode == "fixed" else _official_states
    return max(share(prediction, gold) for gold in accepted(question))


def stock(prediction: str, question: Question, mode: Mode) -> float:
    """Finance (StockQA): an option's letter, or yes or no.

    ``official`` compares what is left without blanks and full stops, so that "B. rising" is not "b".
    """
    golden = accepted(question)
    if mode == "official":
        return float(prediction.lower().replace(" ", "").replace(".", "") in [gold.lower() for gold in golden])
    letters = [gold.strip().upper() for gold in golden if re.fullmatch("[A-Za-z]", gold.strip())]
    words = [gold for gold in golden if gold.strip().upper() not in letters]
    return float(parse_letter(prediction) in letters or any(same_words(prediction, gold) for gold in words))


def _plain(text: str) -> str:
    return text.strip().lower().rstrip(".").rstrip()


def _named_states(prediction: str, gold: str) -> float:
    named, wanted = (
        {_plain(re.sub(r"^\s*and\s+", "", part)) for part in t.split(",")} - {""} for t in (prediction, gold)
    )
    return len(wanted & named) / len(wanted) if wanted else 0.0


def _official_states(prediction: str, gold: str) -> float:
    parts = gold.lower().split(",")
    return sum(part in prediction.lower() for part in parts) / len(parts)
