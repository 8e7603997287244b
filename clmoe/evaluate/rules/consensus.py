"""VQA accuracy for questions that ten people answered, with the normaliser of VQA's evaluation server."""

import re
from functools import lru_cache

from clmoe.data.records import Question
from clmoe.evaluate.rules.base import Mode, unfit
from clmoe.evaluate.rules.words import short_answer

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
# Recognises a contraction that lacks one of its apostrophes. The original has the last entry, too.
_FULL_FORMS = {
    form[:at] + form[at + 1 :]: form
    for form in _CONTRACTIONS.split()
    for at, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def textvqa(prediction: str, question: Question, mode: Mode) -> float:
    """TextVQA: VQA accuracy over the ten answers in ``question.extra["answers"]``.

    The modes differ in one point: ``fixed`` never accepts a prediction without text; ``official`` does if an
    annotator's answer is empty after normalising ("the").
    """
    if mode == "fixed" and not prediction.strip():
        return 0.0
    answers = question.extra.get("answers")
    if not isinstance(answers, list) or len(answers) != 10 or not all(isinstance(answer, str) for answer in answers):
        raise unfit(question, "answers", "the texts of ten annotators; 'short_answer' takes fewer")
    return agreement(prediction, answers)


def vqa(prediction: str, question: Question, mode: Mode) -> float:
    """VQAv2 and CL4VQA.

    ``official`` is CoIN's and CL-MoE's rule: exact match with the test file's one answer, ignoring case. ``fixed`` is
    VQA accuracy if ``question.extra["answers"]`` holds the annotators' answers, else ``short_answer``.
    """
    if mode == "official" or "answers" not in question.extra:
        return short_answer(prediction, question, mode)
    return textvqa(prediction, question, mode)


def agreement(prediction: str, answers: list[str]) -> float:
    """Mean over the annotators of min(1, equal answers of the others / 3), all normalised (VQA v2's evaluation)."""
    said = normalise(prediction)
    equal = [normalise(answer) == said for answer in answers]
    others = [sum(equal) - own for own in equal]
    return sum(min(1.0, count / 3) for count in others) / len(others) if any(equal) else 0.0


@lru_cache(maxsize=2**16)  # annotators use few different answers
def normalise(text: str) -> str:
    """Normalise as VQA's evaluation server does: lower case, no articles or punctuation, digits for number words.

    A punctuation mark between letters becomes a blank. Contractions get their missing apostrophes back. (The original
    stops after the 32nd full stop; this does not.)
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text).split()]
    return " ".join(_FULL_FORMS.get(word, word) for word in words if word not in _ARTICLES)
