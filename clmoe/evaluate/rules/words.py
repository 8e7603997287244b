"""Rules that compare a short answer with the gold answer as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clmoe.evaluate.rules.base import Mode, accepted

if TYPE_CHECKING:
    from clmoe.data.records import Question


def short_answer(prediction: str, question: Question, mode: Mode) -> float:
    """Exact match with an accepted answer, case ignored.

    `fixed` also ignores surrounding blanks and trailing full stops ("Mug." equals "mug") and never accepts an empty
    prediction. `official` is the rule of the VizWiz and VQAv2 scripts of CoIN, and of UCIT's: nothing is removed.
    """
    if mode == "official":
        return float(prediction.upper() in [answer.upper() for answer in accepted(question)])
    return float(same_words(prediction, accepted(question)))


def class_name(prediction: str, question: Question, mode: Mode) -> float:
    """Name of the object in the image (CoIN's ImageNet).

    `fixed` is `short_answer`. `official` accepts, case-sensitively, a prediction that contains the class name or is
    contained in it: "cat" for "catamaran", and an empty prediction for everything.
    """
    if mode == "official":
        return float(any(prediction in answer or answer in prediction for answer in accepted(question)))
    return short_answer(prediction, question, mode)


def gqa(prediction: str, question: Question, mode: Mode) -> float:
    """GQA: exact match. `fixed` is `short_answer`.

    `official` strips trailing full stops and lower-cases the prediction, and compares with the answer as it is
    written, so that a gold answer with a capital is never reached.
    """
    if mode == "official":
        return float(prediction.rstrip(".").lower() in accepted(question))
    return short_answer(prediction, question, mode)


def ocr_vqa(prediction: str, question: Question, mode: Mode) -> float:
    """OCR-VQA: exact match. `fixed` is `short_answer`.

    `official` lower-cases both and strips nothing; a prediction that contains "Unanswerable" is passed over, and
    still counts in the divisor.
    """
    if mode == "official":
        unanswerable = "Unanswerable" in prediction
        return float(not unanswerable and prediction.lower() in [answer.lower() for answer in accepted(question)])
    return short_answer(prediction, question, mode)


def same_words(prediction: str, answers: list[str]) -> bool:
    """A prediction of more than full stops equals an answer, but for blanks around, case and trailing full stops."""
    return bool(plain(prediction)) and plain(prediction) in [plain(answer) for answer in answers]


def plain(text: str) -> str:
    """Lower case, without surrounding blanks and trailing full stops."""
    return text.strip().lower().rstrip(".").rstrip()
