"""Scoring rules against golden cases worked out by hand; official mode against CoIN's documented faults."""

from typing import Any

import pytest

from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.scoring import SCORERS, accuracy, official_box, parse_box, score


def question(answer: str = "", **extra: Any) -> Question:
    return Question(question_id="7", image=None, text="?", answer=answer, extra=extra)


def both(scorer: str, prediction: str, gold: Question) -> tuple[float, float]:
    return score(scorer, prediction, gold, "official"), score(scorer, prediction, gold, "fixed")


@pytest.mark.parametrize(
    ("prediction", "gold", "official", "fixed"),
    [
        ("mug", "mug", 1, 1),
        ("  MUG \n", "Mug", 1, 1),
        ("Mug.", "mug", 0, 1),
        ("Left.", "left", 0, 1),
        ("mug", "mug.", 0, 1),
        ("a mug", "mug", 0, 0),
        ("cat", "catamaran", 0, 0),
        ("", "catamaran", 0, 0),
        ("", ".", 0, 0),
        ("3.5", "35", 0, 0),
        (".5", "5", 0, 0),
    ],
)
def test_short_answer(prediction: str, gold: str, official: int, fixed: int) -> None:
    assert both("short_answer", prediction, question(gold)) == (official, fixed)


@pytest.mark.parametrize(
    ("prediction", "gold", "official", "fixed"),
    [
        ("B", "B", 1, 1),
        ("b", "B", 1, 1),
        ("B.", "B", 1, 1),
        ("(B)", "B", 1, 1),
        (" B\n", "B", 1, 1),
        ("B. steam", "B", 1, 1),
        ("B: steam", "B", 1, 1),
        ("B) steam", "B", 1, 1),
        ("(b) steam", "B", 1, 1),
        ("The answer is B.", "B", 1, 1),
        ("The answer is (B) steam", "B", 1, 1),
        ("The answer is B because steam is a gas", "B", 1, 1),
        ("Answer: B", "B", 1, 1),
        ("The correct option is B", "B", 1, 1),
        ("A dog", "A", 1, 0),  # the stray article
        ("It is a dog", "A", 1, 0),
        ("A dog", "B", 0, 0),
        ("The answer is a dog.", "A", 1, 0),
        ("The answer is A dog", "A", 1, 0),
        ("The answer is A.", "A", 1, 1),
        ("It's option B.", "B", 0, 1),  # official reads the s of "It's"
        ("A. a bee", "A", 1, 1),
        ("steam", "B", 0, 0),
        ("", "A", 0, 0),
        ("AB", "A", 0, 0),
        ("Apple", "A", 0, 0),
        ("C", "B", 0, 0),
        ("F", "F", 0, 1),  # official knows A to E only
    ],
)
def test_option_letter(prediction: str, gold: str, official: int, fixed: int) -> None:
    assert both("option_letter", prediction, question(gold)) == (official, fixed)


def test_option_letter_refuses_a_gold_answer_that_is_no_letter() -> None:
    with pytest.raises(ClmoeError, match=r"question 7: field 'answer' is 'steam'"):
        score("option_letter", "A", question("steam"))


GOLD = "[0.12, 0.30, 0.50, 0.94]"


@pytest.mark.parametrize(
    ("prediction", "gold", "official", "fixed"),
    [
        (GOLD, GOLD, 1, 1),
        # the cut reads y2 = 0.1 instead of 0.19, which leaves no height
        ("[0.01, 0.10, 0.91, 0.19]", "[0.01, 0.10, 0.91, 0.19]", 0, 1),
        ("[1.00, 0.3, 1.0, 0.9]", "[0.0, 0.3, 1.0, 0.9]", 0, 0),
        ("[0.1, 0.2, 0.5]", GOLD, 0, 0),
        ("the red cup", GOLD, 0, 0),
        ("", GOLD, 0, 0),
        ("[0.12, 0.30, 0.50, 0.94, 0.1]", GOLD, 0, 0),
        ("[0.12, 0.30, 0.50, 0.94", GOLD, 1, 0),  # unclosed: malformed; official drops brackets anyway
        ("[0.12, 0.30, nan, 0.94]", GOLD, 0, 0),
        ("[0.50, 0.30, 0.12, 0.94]", GOLD, 0, 0),
        ("0.12, 0.30, 0.50, 0.94", GOLD, 1, 1),
        (" [ .12,0.3 ,0.5, 0.94 ].", GOLD, 1, 1),  # the cut happens to take a blank and the full stop
    ],
)
def test_iou(prediction: str, gold: str, official: int, fixed: int) -> None:
    assert both("iou", prediction, question(answer_bbox=gold, size=[640, 480])) == (official, fixed)


def test_official_box_parser_cuts_one_character_at_each_end() -> None:
    assert official_box(GOLD) == (0.12, 0.30, 0.50, 0.9)
    assert official_box("[1.00, 0.3, 1.0, 0.9]") == (0.0, 0.3, 1.0, 0.0)
    box = parse_box(GOLD)
    assert box is not None
    assert [float(value) for value in box] == [0.12, 0.30, 0.50, 0.94]


@pytest.mark.parametrize("bottom", ["0.1", "0.3", "0.7"])
def test_iou_of_exactly_one_half_is_wrong_and_the_next_decimal_right(bottom: str) -> None:
    """Half of the gold box's width; in floating point some of these ratios come out above 0.5."""
    gold = question(answer_bbox=f"[0.1, 0.0, 0.7, {bottom}]")
    assert score("iou", f"[0.1, 0.0, 0.4, {bottom}]", gold) == 0.0
    assert score("iou", f"[0.1, 0.0, 0.4001, {bottom}]", gold) == 1.0


def test_iou_takes_a_list_and_does_not_need_the_size() -> None:
    assert both("iou", GOLD, question(answer_bbox=[0.12, 0.3, 0.5, 0.94])) == (1, 1)


@pytest.mark.parametrize("gold", [{}, {"answer_bbox": "[0.1, 0.2]"}, {"answer_bbox": [0.5, 0.2, 0.1, 0.4]}])
def test_iou_refuses_a_malformed_gold_box(gold: dict[str, Any]) -> None:
    with pytest.raises(ClmoeError, match=r"question 7: field 'answer_bbox'"):
        score("iou", GOLD, question(**gold))


def test_unknown_scorer_and_mode_name_the_way_out() -> None:
    with pytest.raises(ClmoeError, match="did you mean 'short_answer'"):
        score("shortanswer", "a", question("a"))
    with pytest.raises(ClmoeError, match="fixed, official"):
        score("iou", "a", question("a"), "offical")  # type: ignore[arg-type]


def test_every_scorer_returns_zero_or_one_for_nonsense() -> None:
    gold = question("B", answer_bbox=GOLD)
    for name in SCORERS:
        for text in ("", "\x00", "[[[[", "1,2,3,4", "٣", "B" * 5000):
            assert set(both(name, text, gold)) <= {0.0, 1.0}


def test_accuracy_counts_unanswered_questions_and_ignores_order_and_id_type() -> None:
    questions = [Question(str(i), None, "?", answer, {}) for i, answer in enumerate("abcd")]
    predictions: dict[Any, str] = {3: "d", "0": "a", 1: "wrong"}
    assert accuracy("short_answer", predictions, questions) == 50.0


def test_accuracy_refuses_predictions_of_another_file() -> None:
    with pytest.raises(ClmoeError, match="question_id '9'"):
        accuracy("short_answer", {"9": "a"}, [question("a")])
    with pytest.raises(ClmoeError, match="no questions"):
        accuracy("short_answer", {}, [])
