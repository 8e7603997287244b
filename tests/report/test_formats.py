"""Answers that are right but for their form and answers in another task's words, against counts by hand."""

from pathlib import Path

import pytest

from clmoe.report.formats import formats_frame, right_but_for_form
from clmoe.report.runs import group_runs
from clmoe.report.tables import formats_table
from tests.report.folders import make_run, predict

PROMPT = "Which colour?\nA. red\n(B) dark blue\nAnswer with the option's letter."


@pytest.mark.parametrize(
    ("text", "expected", "same"),
    [
        ("Mug.", "mug", True),
        ("two", "2", True),
        ("a mug", "The mug", True),
        ("mugs", "mug", False),
        ("mug", "cup | mug", True),
        ("red", "A", True),
        ("Dark blue.", "B", True),
        ("The answer is B", "B", True),
        ("B", "dark blue", True),
        ("A", "B", False),
        ("red", "B", False),
        ("C", "B", False),
        ("", "B", False),
        ("[0.1, 0.2, 0.5, 0.6].", "[0.1, 0.2, 0.5, 0.6]", True),
        ("[0.1, 0.2, 0.5, 0.7]", "[0.1, 0.2, 0.5, 0.6]", False),
    ],
)
def test_what_is_only_form(text: str, expected: str, same: bool) -> None:
    assert right_but_for_form(text, PROMPT, expected) is same


def test_forgotten_in_any_form_and_foreign_words(tmp_path: Path) -> None:
    run = make_run(tmp_path, "lora", 0)
    ask = {"prompt": PROMPT, "answer": "A"}
    predict(run, "colour_letter", "colour_letter", {"a": ("A", 1), "b": ("A", 1), "c": ("B", 0)}, **ask)
    # a: another form; b: words of "count"; c: wrong then, its own task's word now; d was not asked then
    end = {"a": ("red", 0), "b": ("seven", 0), "c": ("A", 1), "d": ("7", 0)}
    predict(run, "box", "colour_letter", end, **ask)
    predict(run, "count", "count", {"a": ("7", 1), "b": ("7", 1)}, answer="7")
    predict(run, "box", "count", {"a": ("7", 1), "b": ("[0.1, 0.1, 0.2, 0.2]", 0)}, answer="7")
    predict(run, "box", "box", {"a": ("[0.2, 0.1, 0.2, 0.2]", 0.25)}, answer="[0.3, 0.1, 0.4, 0.2]")
    frame = formats_frame(group_runs([run])).set_index("task")
    letters, count, box = frame.loc["colour_letter"], frame.loc["count"], frame.loc["box"]
    assert (letters["last"], letters["last_any_form"]) == pytest.approx((100 / 3, 200 / 3))
    assert (letters["forgotten"], letters["forgotten_any_form"]) == pytest.approx((100 / 3, 0))
    assert letters["foreign"] == pytest.approx(100 / 3)
    assert (count["forgotten"], count["forgotten_any_form"], count["foreign"]) == (50, 50, 50)  # a box is foreign
    assert (box["last"], box["foreign"]) == (25, 0) and frame["forgotten"].isna().tolist() == [False, False, True]
    (row,) = formats_table(group_runs([run]), frame.reset_index()).cells.to_dict("records")
    assert row["label"] == "lora" and row["forgotten"] == f"{(100 / 3 + 50) / 2:.2f}"


def test_captions_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path, "lora", 0)
    predict(run, "box", "count", {"a": ("a red mug", 1.2)})
    (run / "predictions/box/count.json").write_text('{"parts": {"BLEU-1": 0.4}}')
    assert formats_frame(group_runs([run])).empty
