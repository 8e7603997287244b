"""The rule for visual grounding, which compares boxes."""

import re
from collections.abc import Sequence
from fractions import Fraction

from clmoe.data.records import Question
from clmoe.evaluate.rules.base import Mode, unfit

Box = tuple[Fraction, Fraction, Fraction, Fraction]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_FOUR_NUMBERS = r"\s*,\s*".join([f"({_NUMBER})"] * 4)
_BOX = re.compile(rf"\s*(\[)?\s*{_FOUR_NUMBERS}\s*(?(1)\])\s*\.?\s*", re.ASCII)


def iou(prediction: str, question: Question, mode: Mode) -> float:
    """Visual grounding: 1 if the boxes' intersection over union is strictly above 0.5, else 0.

    Boxes are ``[x1, y1, x2, y2]`` in fractions of the image padded to a square; ``question.extra["answer_bbox"]`` is a
    string or a list. ``fixed`` computes exactly with the printed decimals. ``official`` keeps CoIN's parser, which cuts
    a character off either end, and its pixels: both boxes times the larger of ``question.extra["size"]``, if given.
    """
    gold = _gold_box(question)
    if mode == "fixed":
        box = parse_box(prediction)
        return float(box is not None and _overlap(box, gold) > Fraction(1, 2))
    side, cut = _side(question), official_box(prediction)
    if cut is None:
        return 0.0
    return float(_overlap([value * side for value in cut], [float(value) * side for value in gold]) > 0.5)


def parse_box(text: str) -> Box | None:
    """Read ``[x1, y1, x2, y2]`` (brackets optional, nothing else around it), exactly; None if malformed or inverted."""
    match = _BOX.fullmatch(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (Fraction(number) for number in match.groups()[1:])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def official_box(text: str) -> tuple[float, float, float, float] | None:
    """Read a box as CoIN's grounding script does: it removes the brackets, then cuts one more character at each end.

    "[0.12, 0.30, 0.50, 0.94]" becomes (.12, .30, .50, .9), and a leading "1.00" becomes 0.0.
    """
    inner = text.removeprefix(" ").replace("[", "").replace("]", "")[1:-1]
    try:
        x1, y1, x2, y2 = (float(part) for part in inner.split(","))
    except ValueError:
        return None
    return x1, y1, x2, y2


def _gold_box(question: Question) -> Box:
    gold = question.extra.get("answer_bbox")
    text = gold if isinstance(gold, str) else ", ".join(map(str, gold)) if isinstance(gold, list) else ""
    box = parse_box(text)
    if box is None:
        raise unfit(question, "answer_bbox", "[x1, y1, x2, y2] with x1 < x2 and y1 < y2, in fractions of the image")
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
