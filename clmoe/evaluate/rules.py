"""The scoring rules of single answers: short answers, letters of options, ten annotators' consensus, boxes.

Every rule has two modes. ``fixed``, the default, scores what the metric means. ``official`` computes what the
benchmark's published script computes, faults included; ``scripts/score.py`` adds its faults in reading answer files.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal, get_args

from clmoe.data.records import Question
from clmoe.data.rows import short
from clmoe.errors import ClmoeError

Mode = Literal["fixed", "official"]
MODES: tuple[str, ...] = get_args(Mode)
Scorer = Callable[[str, Question, Mode], float]
"""A rule for one prediction: its score in [0, 1]."""


def unfit(question: Question, field: str, needed: str) -> ClmoeError:
    """The error for a question whose gold answer does not fit its rule."""
    value = question.answer if field == "answer" else question.extra.get(field)
    return ClmoeError(
        f"question {question.question_id}: field {field!r} is {short(repr(value))}, but its scorer needs {needed}"
    )


# ---- Letters of options

# Markdown, quotes and the kind of brackets mean nothing; an apostrophe within a word stays.
_DECORATION = re.compile(r"""[*_`"“”„«»「」『』$#]|(?<!\w)['‘’]|['‘’](?!\w)|\\boxed""")
_BRACKETS = str.maketrans("[{【《]}】》。", "(((()))).")
# Tried in this order. An unmarked "A" or "I" before another word is the article or the pronoun, and a letter before a
# full stop and one more letter is a part of an abbreviation ("U.S.").
_LONE_LETTER = re.compile(r"\(?([A-Za-z])\)?[.,:;!?)]*", re.ASCII)
_LEADING_LETTER = re.compile(
    r"\(([A-Za-z])\)(?=[\s.,:;-])|\(([A-Z])\)|([A-Z])[.,:;)](?![A-Z]\b|[A-Za-z]\.)"
    r"|([A-Z])(?=\s*\n|\s+[-–—=:]\s|\s+is\s+(?:the\s+)?(?:correct|right|answer)\b)",
    re.ASCII,
)
_NAMED_LETTER = re.compile(
    r"\b(?i:answer|option|choice|letter)(?:\s+(?i:is))?\s*[:=-]?\s*"
    r"(?:\(([A-Za-z])\)|([A-Za-z])(?=\s*(?:[.,:;!?)]|$))|([B-HJ-Zb-hj-z])(?=\s))"
    r"|\b(?i:option|choice|letter)\s+(A)\b",
    re.ASCII,
)


def option_letter(prediction: str, question: Question, mode: Mode) -> float:
    """Multiple choice: the prediction names the letter ``question.answer``.

    ``fixed`` reads "B", "b.", "(B)", "**B**", "B. text", "B.text", "The answer is b." and "Option B"; it does not take
    the article in "A dog" for option A. ``official`` is CoIN's ScienceQA rule: an exact "A" to "E", or a leading "B. ",
    or else the first one-character word, upper-cased, whatever it is.
    """
    gold = question.answer.strip().upper()
    if not re.fullmatch("[A-Z]", gold):
        raise unfit(question, "answer", "one letter; 'short_answer' takes any text")
    if mode == "fixed":
        return float(parse_letter(prediction) == gold)
    if re.match(r"[A-E](?:$|\. )", prediction):
        return float(prediction[0] == gold)
    word = re.search(r"\b\w\b", prediction)
    return float(word is not None and word[0].upper() == gold and gold in "ABCDE")


def parse_letter(text: str) -> str | None:
    """The option letter (upper case) that an answer names, or None."""
    text = _DECORATION.sub("", unicodedata.normalize("NFKC", text)).translate(_BRACKETS).strip(" \t\r\n->•")
    match = _LONE_LETTER.fullmatch(text) or _LEADING_LETTER.match(text) or _NAMED_LETTER.search(text)
    return match[match.lastindex].upper() if match and match.lastindex else None


# ---- Short answers
#
# MLLM-DCL's published rules (`contains_...`, `science`) look for the gold answer anywhere in the prediction and find
# "no" in "none" and in "it is not". Their `fixed` versions look for whole words. All published rules of MLLM-DCL skip
# predictions with "Unanswerable", whatever the gold answer, and count them as wrong.

_SKIPPED = "Unanswerable"

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
    """Equal, ignoring case, surrounding blanks and trailing full stops ("Mug." is "mug"); empty text equals nothing."""
    return bool(_plain(text)) and _plain(text) == _plain(gold)


def has_words(text: str, gold: str) -> bool:
    """``gold`` occurs with no letter or digit next to it, ignoring case and trailing full stops."""
    wanted = _plain(gold)
    return bool(wanted) and re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text.lower()) is not None


def official_words(text: str, gold: str) -> bool:
    """MLLM-DCL's eval_ai2d.py: a word needs a blank on one side, or a full stop or comma after it; a phrase nothing."""
    if _SKIPPED in text:
        return False
    text, gold = text.lower(), gold.lower()
    if " " not in gold:
        gold = gold.replace(".", "")
        if " " in text:
            return any(form in text for form in (f" {gold}", f"{gold} ", f"{gold}.", f"{gold},"))
    return gold in text


def _official_equal(text: str, gold: str) -> bool:
    return _SKIPPED not in text and text.lower() == gold.lower()


short_answer = any_matches(same_words, lambda text, gold: text.upper() == gold.upper())
"""Exact match. ``official`` is the rule of CoIN's VizWiz and VQAv2 scripts and of UCIT's: it strips nothing."""

class_name = any_matches(same_words, lambda text, gold: text in gold or gold in text)
"""Name of the object in the image (CoIN's ImageNet). ``official`` takes "cat" for "catamaran", and "" for anything."""

gqa = any_matches(same_words, lambda text, gold: text.rstrip(".").lower() == gold)
"""GQA. ``official`` lower-cases only the prediction, so nothing matches a gold answer with a capital."""

ocr_vqa = any_matches(same_words, _official_equal)
"""OCR-VQA. ``official`` strips nothing, and accepts no "Unanswerable"."""

contains_words = any_matches(has_words, official_words)
"""Remote sensing and driving: the prediction contains the answer."""

contains_answer = any_matches(has_words, lambda text, gold: _SKIPPED not in text and gold.lower() in text.lower())
"""Medicine (PathVQA): the prediction contains the answer; with ``official``, as any substring."""


def science(prediction: str, question: Question, mode: Mode) -> float:
    """Science: exact match for images of AI2D, TQA, VQA and SciVerse; MapQA's "Which states" gives partial credit.

    The image's name up to the first "_" is its source. The credit is the share of the gold states that the prediction
    names, both split at commas; ``official`` keeps blanks and full stops ("Texas." is not "Texas"). MapQA's other
    questions follow ``contains_answer``.
    """
    if PurePosixPath(question.image or "").name.split("_")[0] in ("AI2D", "TQA", "VQA", "SciVerse"):
        return ocr_vqa(prediction, question, mode)
    if "Which states" not in question.text:
        return contains_answer(prediction, question, mode)
    share = _named_states if mode == "fixed" else _official_states
    return max(share(prediction, gold) for gold in accepted(question))


def stock(prediction: str, question: Question, mode: Mode) -> float:
    """Finance (StockQA): an option's letter, yes or no. ``official`` only drops blanks and full stops ("B. rising")."""
    golden = accepted(question)
    if mode == "official":
        said = prediction.lower().replace(" ", "").replace(".", "")
        return float(_SKIPPED not in prediction and said in [gold.lower() for gold in golden])
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
    parts, named = gold.lower().split(","), prediction.lower().split(",")
    return 0.0 if _SKIPPED in prediction else sum(part in named for part in parts) / len(parts)


# ---- Yes or no

_YES_NO = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


def pope(prediction: str, question: Question, mode: Mode) -> float:
    """POPE: yes or no. ``fixed`` reads the first of these words; an answer without one is wrong.

    ``official`` reads up to the first full stop: it is "no" if it has the word "No", "no" or "not" between blanks, and
    otherwise "yes", whatever it is.
    """
    if mode == "fixed":
        return float(_said(prediction) == _yes_or_no(question))
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return float(("no" if {"No", "no", "not"} & {*words} else "yes") == _yes_or_no(question))


def mme(prediction: str, question: Question, mode: Mode) -> float:
    """MME: yes or no, as ``pope``. ``official`` looks for "yes", then for "no", in the first four characters."""
    said, gold = _said(prediction), _yes_or_no(question)
    if not isinstance(question.extra.get("category"), str):
        raise unfit(question, "category", "the name of MME's subtask, such as 'existence'")
    if mode == "official":
        said = next((word for word in ("yes", "no") if word in prediction.lower()[:4]), None)
    return float(said == gold)


def _said(prediction: str) -> str | None:
    match = _YES_NO.search(prediction)
    return None if match is None else {"yes": "yes"}.get(match[0].lower(), "no")


def _yes_or_no(question: Question) -> str:
    gold = _plain(question.answer)
    if gold not in ("yes", "no"):
        raise unfit(question, "answer", "yes or no")
    return gold


# ---- VQA accuracy, with the normaliser of VQA's evaluation server

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

    ``official`` accepts a prediction without text if an annotator's answer is empty after normalising ("the"), and
    removes only the first 32 full stops, because the script gives ``re.sub`` its flag as the count.
    """
    if mode == "fixed" and not prediction.strip():
        return 0.0
    answers = question.extra.get("answers")
    if not isinstance(answers, list) or len(answers) != 10 or not all(isinstance(answer, str) for answer in answers):
        raise unfit(question, "answers", "the texts of ten annotators; 'short_answer' takes fewer")
    return agreement(prediction, answers, 32 if mode == "official" else 0)


def vqa(prediction: str, question: Question, mode: Mode) -> float:
    """VQAv2 and CL4VQA.

    ``official`` is CoIN's and CL-MoE's rule: exact match with the test file's one answer, ignoring case. ``fixed`` is
    VQA accuracy if ``question.extra["answers"]`` holds the annotators' answers, else ``short_answer``.
    """
    if mode == "official" or "answers" not in question.extra:
        return short_answer(prediction, question, mode)
    return textvqa(prediction, question, mode)


def agreement(prediction: str, answers: list[str], stops: int = 0) -> float:
    """Mean over the annotators of min(1, equal answers of the others / 3), all normalised (VQA v2's evaluation)."""
    said = normalise(prediction, stops)
    equal = [normalise(answer, stops) == said for answer in answers]
    others = [sum(equal) - own for own in equal]
    return sum(min(1.0, count / 3) for count in others) / len(others) if any(equal) else 0.0


@lru_cache(maxsize=2**16)  # annotators use few different answers
def normalise(text: str, stops: int = 0) -> str:
    """As VQA's evaluation server: lower case, no articles or punctuation, and no full stops or the first ``stops``.

    Number words become digits, a mark between letters becomes a blank, and contractions get missing apostrophes back.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    text = text.strip().replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _PUNCTUATION:
        text = text.replace(mark, "" if f"{mark} " in spaced or f" {mark}" in spaced else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", text, count=stops).split()]
    return " ".join(_FULL_FORMS.get(word, word) for word in words if word not in _ARTICLES)


# ---- Boxes

Box = tuple[Fraction, Fraction, Fraction, Fraction]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_FOUR_NUMBERS = r"\s*,\s*".join([f"({_NUMBER})"] * 4)
_BOX = re.compile(rf"\s*(\[)?\s*{_FOUR_NUMBERS}\s*(?(1)\])\s*\.?\s*", re.ASCII)


def iou(prediction: str, question: Question, mode: Mode) -> float:
    """Visual grounding: 1 if the boxes' intersection over union is strictly above 0.5, else 0.

    Boxes are ``[x1, y1, x2, y2]`` in fractions of the image padded to a square; ``question.extra["answer_bbox"]`` is a
    string or a list. ``fixed`` computes exactly with the printed decimals. ``official`` keeps CoIN's parser, which cuts
    a character off either end within the brackets ("0.12, 0.94" becomes .12, .9; "1.00, ..." 0.0, ...), and its pixels:
    both boxes times the larger of ``question.extra["size"]``, if given. No box matches a gold box without area.
    """
    gold = _gold_box(question, mode)
    if mode == "fixed":
        box = parse_box(prediction)
        return float(box is not None and _overlap(box, gold) > Fraction(1, 2))
    side = _side(question)
    inner = prediction.replace("[", "").replace("]", "")[1:-1]
    try:
        x1, y1, x2, y2 = (float(part) * side for part in inner.split(","))
    except ValueError:
        return 0.0
    return float(_overlap([x1, y1, x2, y2], [value * side for value in gold]) > 0.5)


def parse_box(text: str) -> Box | None:
    """Read ``[x1, y1, x2, y2]`` (brackets optional, nothing else around it), exactly; None if malformed or inverted."""
    match = _BOX.fullmatch(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (Fraction(number) for number in match.groups()[1:])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _gold_box(question: Question, mode: Mode) -> list[Any]:
    """Four numbers, exact for ``fixed``; raises ClmoeError for anything else, where the published script crashes."""
    gold, number = question.extra.get("answer_bbox"), Fraction if mode == "fixed" else float
    text = ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold)
    text = text.replace("[", "").replace("]", "")
    try:
        box = [number(part) for part in (text.strip().rstrip(".") if mode == "fixed" else text).split(",")]
    except (ValueError, ZeroDivisionError):  # Fraction reads "1/0"
        box = []
    if len(box) != 4:
        raise unfit(question, "answer_bbox", "[x1, y1, x2, y2] in fractions of the image")
    return box


def _side(question: Question) -> float:
    """Side of the padded image; 1 if its size is not given."""
    size = question.extra.get("size")
    if size is None:
        return 1
    if not isinstance(size, list) or len(size) != 2 or not all(isinstance(n, int | float) and n > 0 for n in size):
        raise unfit(question, "size", "[width, height] in pixels")
    return float(max(size))


def _overlap(a: Sequence[Fraction | float], b: Sequence[Fraction | float]) -> Fraction | float:
    """Intersection over union; 0 if the union has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = width * height if width > 0 and height > 0 else 0
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0
